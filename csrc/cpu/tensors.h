// Tensors through the stable ABI: their element types, and new ones.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <stdexcept>

#include "check.h"
#include "core/dtype.h"

namespace hivilt {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return DType::kFloat32;
    case torch::headeronly::ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      if (x.scalar_type() != torch::headeronly::ScalarType::Half)
        reject("dtype", "float32, bfloat16 or float16", "another");
      return DType::kFloat16;
  }
}

inline void succeed(AOTITorchError error) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error("hivilt: torch refused a tensor (out of memory?)");
}

// Straight through the C interface: torch::stable::new_empty looks its operator up by name in every call.
template <size_t kDims>
Tensor strided(const int64_t (&sizes)[kDims], const int64_t (&strides)[kDims], int32_t dtype) {
  AtenTensorHandle handle = nullptr;
  succeed(aoti_torch_empty_strided(kDims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// A contiguous tensor without contents.
template <size_t kDims>
Tensor empty(const int64_t (&sizes)[kDims], int32_t dtype) {
  int64_t strides[kDims], stride = 1;
  for (size_t dim = kDims; dim-- > 0; stride *= std::max<int64_t>(1, sizes[dim])) strides[dim] = stride;
  return strided(sizes, strides, dtype);
}

inline int32_t dtype_code(const Tensor& x) {
  int32_t dtype;
  succeed(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

// A float32 tensor of no dimensions.
inline Tensor scalar(float value) {
  const int64_t none[1] = {1};
  AtenTensorHandle handle = nullptr;
  succeed(
      aoti_torch_empty_strided(0, none, none, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &handle));
  Tensor x(handle);
  *static_cast<float*>(x.data_ptr()) = value;
  return x;
}

}  // namespace hivilt
