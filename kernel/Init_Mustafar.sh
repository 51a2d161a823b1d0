# Source this from bash or zsh: it tells the shell where Mustafar is and which tools to use.
#   source kernel/Init_Mustafar.sh && make -C build
MUSTAFAR_HOME="$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")/.." && pwd)"
export MUSTAFAR_HOME

# The repository's environment, also where `make` is only about to make it.
case ":$PATH:" in
  *":$MUSTAFAR_HOME/.venv/bin:"*) ;;
  *) export PATH="$MUSTAFAR_HOME/.venv/bin:$PATH" ;;
esac

# nvcc's toolkit, for machines that have one outside the PATH.
if [ -z "${CUDA_HOME:-}" ]; then
  if command -v nvcc > /dev/null 2>&1; then
    CUDA_HOME="$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")"
    export CUDA_HOME
  elif [ -x /usr/local/cuda/bin/nvcc ]; then
    export CUDA_HOME=/usr/local/cuda PATH="/usr/local/cuda/bin:$PATH"
  fi
fi

echo "MUSTAFAR_HOME=$MUSTAFAR_HOME CUDA_HOME=${CUDA_HOME:-(none: CPU kernels only)}"
