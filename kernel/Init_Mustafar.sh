# Source this from bash or zsh: it tells the shell where Mustafar is and which tools to use.
#   source kernel/Init_Mustafar.sh && make -C build
MUSTAFAR_HOME="$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")/.." && pwd)"
export MUSTAFAR_HOME

# The repository's environment, also where `make` is only about to make it.
case ":$PATH:" in
  *":$MUSTAFAR_HOME/.venv/bin:"*) ;;
  *) export PATH="$MUSTAFAR_HOME/.venv/bin:$PATH" ;;
esac

# nvcc's toolkit, for machines that have one outside the PATH. A folder without the headers is none: nvcc on the
# PATH may be a wrapper.
if [ -z "${CUDA_HOME:-}" ]; then
  nvcc="$(command -v nvcc 2> /dev/null)" && nvcc="$(readlink -f "$nvcc")"
  for toolkit in "${nvcc%/bin/nvcc}" /usr/local/cuda; do
    if [ -e "$toolkit/include/cuda_runtime.h" ] && [ -x "$toolkit/bin/nvcc" ]; then
      export CUDA_HOME="$toolkit" PATH="$toolkit/bin:$PATH"
      break
    fi
  done
  unset nvcc toolkit
fi

echo "MUSTAFAR_HOME=$MUSTAFAR_HOME CUDA_HOME=${CUDA_HOME:-(none: CPU kernels only)}"
