"""How fast the kernels are, next to the best dense ones: `make -C build bench`.

Writes one CSV a machine, plots beside it, and the sparsity from which on the kernels beat dense attention.
`python -m mustafar.kernel.benchmark` is the same without building first.
"""
