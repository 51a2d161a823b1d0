// The ops of torch.ops.mustafar: their schemas, and nothing else. ops_cpu.cpp, ops_cuda.cpp,
// ops_cuda_compression.cpp and ops_cuda_window.cpp implement them.
#include <Python.h>
#include <torch/library.h>

// A bare module: importing mustafar._C runs the registrations below.
extern "C" PyObject* PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

namespace mustafar {
int64_t decode_attention_workspace_size(int64_t batch, int64_t q_heads, int64_t kv_heads, int64_t head_dim,
                                        int64_t slices, int64_t window_capacity);
std::string simd_level();
bool has_cuda();
}  // namespace mustafar

TORCH_LIBRARY(mustafar, m) {
  m.set_python_module("mustafar.ops");
  const auto pure = std::vector<at::Tag>{at::Tag::pt2_compliant_tag};
  m.def("prune_compress(Tensor x, int k) -> (Tensor bitmap, Tensor values)", pure);
  m.def("compress(Tensor x) -> (Tensor bitmap, Tensor values, Tensor offsets, Tensor widths)", pure);
  m.def(
      "decompress(Tensor bitmap, Tensor values, Tensor? offsets, Tensor? widths, int tokens, int head_dim) "
      "-> Tensor",
      pure);
  m.def(
      "key_scores(Tensor q, Tensor bitmap, Tensor values, Tensor? offsets, Tensor? widths, int tokens) "
      "-> Tensor",
      pure);
  m.def(
      "value_output(Tensor p, Tensor bitmap, Tensor values, Tensor? offsets, Tensor? widths, int head_dim) "
      "-> Tensor",
      pure);
  m.def(
      "decode_attention(Tensor q, "
      "Tensor k_bitmap, Tensor k_values, Tensor? k_offsets, Tensor? k_widths, "
      "Tensor v_bitmap, Tensor v_values, Tensor? v_offsets, Tensor? v_widths, "
      "Tensor k_window, Tensor v_window, Tensor lengths, Tensor? starts, float scale, int sliding_window, "
      "Tensor(a!)? workspace) -> Tensor",
      pure);
  m.def(
      "window_advance(Tensor(a!) state, Tensor(b!) lengths, Tensor(c!) total, int residual, int flush_every, "
      "int max_length) -> ()",
      pure);
  m.def(
      "window_append(Tensor k, Tensor v, Tensor(a!) k_bitmap, Tensor(b!) k_values, Tensor(c!) v_bitmap, "
      "Tensor(d!) v_values, Tensor(e!) k_window, Tensor(f!) v_window, Tensor state, int k_kept, int v_kept) "
      "-> ()",
      pure);
  m.def(
      "decode_attention_workspace_size(int batch, int q_heads, int kv_heads, int head_dim, int slices, "
      "int window_capacity) -> int",
      &mustafar::decode_attention_workspace_size);
  m.def("simd_level() -> str", &mustafar::simd_level);
  m.def("has_cuda() -> bool", &mustafar::has_cuda);
}
