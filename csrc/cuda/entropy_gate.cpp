// entropy_gate on CUDA: checks what ops/entropy_gate.py hands over, all of it (B, channels, locations), and launches.
#include "cuda/entropy_gate.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <limits>
#include <optional>

namespace csf::entropy_gate::cuda {
namespace {

using torch::stable::Tensor;

bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

Shape make_shape(const Tensor& features, const Tensor& logits, bool channels_last) {
  const ScalarType feature_type = features.scalar_type(), logit_type = logits.scalar_type();
  STD_TORCH_CHECK(is_floating(feature_type) && is_floating(logit_type) &&
                      (feature_type == ScalarType::Double) == (logit_type == ScalarType::Double),
                  "entropy_gate: features and logits must both be fp64, or each fp32, bf16 or fp16");
  STD_TORCH_CHECK(features.dim() == 3 && logits.dim() == 3 && features.size(0) == logits.size(0) &&
                      features.size(2) == logits.size(2) && logits.size(1) >= 2,
                  "entropy_gate: expected features (B, C, locations) and logits (B, M, locations), M at least 2");
  const double inverse_log_classes = 1 / std::log(static_cast<double>(logits.size(1)));
  return {feature_type,   logit_type,       features.size(0),    features.size(1),
          logits.size(1), features.size(2), inverse_log_classes, channels_last};
}

int64_t stride(const Tensor& tensor, int64_t axis) {
  return tensor.size(axis) == 1 ? 0 : tensor.stride(axis);
}

// A tensor of the shape's images and locations, whose elements adjoin along `adjoining` (no axis if that is -1).
View make_view(const Tensor& tensor, const Tensor& features, const Shape& shape, int64_t channels, ScalarType type,
               int64_t adjoining, void* data) {
  STD_TORCH_CHECK(tensor.device() == features.device(), "entropy_gate: tensors must be on one device");
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.dim() == 3 && tensor.size(0) == shape.images &&
                      tensor.size(1) == channels && tensor.size(2) == shape.locations &&
                      (adjoining < 0 || tensor.size(adjoining) == 1 || tensor.stride(adjoining) == 1),
                  "entropy_gate: a tensor has the wrong dtype, shape or strides");
  return {static_cast<char*>(data), stride(tensor, 0), stride(tensor, 1), stride(tensor, 2)};
}

// The tensors of one call, as views that fit its shape.
struct Views {
  const Tensor& features;
  const Shape& shape;

  View of_features(const Tensor& tensor, void* data) const {
    return make_view(tensor, features, shape, shape.channels, shape.feature_type, shape.channels_last ? 1 : 2, data);
  }
  View of_logits(const Tensor& tensor, void* data) const {
    return make_view(tensor, features, shape, shape.classes, shape.logit_type, -1, data);
  }
  View of_uncertainty(const Tensor& tensor, void* data) const {
    const ScalarType type = shape.feature_type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    return make_view(tensor, features, shape, 1, type, 2, data);
  }
};

void* readable(const Tensor& tensor) {
  return const_cast<void*>(tensor.const_data_ptr());
}

template <class Work>
void launch_any(const Work& work, const Tensor& features) {
  if (work.shape.images == 0 || work.shape.locations == 0) return;
  launch(work, features.get_device_index());
}

void entropy_gate_forward(const Tensor& features, const Tensor& logits, bool channels_last, Tensor gated,
                          Tensor uncertainty) {
  const Shape shape = make_shape(features, logits, channels_last);
  const Views views{features, shape};
  launch_any(Forward{shape, views.of_features(features, readable(features)), views.of_logits(logits, readable(logits)),
                     views.of_features(gated, gated.mutable_data_ptr()),
                     views.of_uncertainty(uncertainty, uncertainty.mutable_data_ptr())},
             features);
}

void entropy_gate_backward(const std::optional<Tensor>& grad_gated, const std::optional<Tensor>& grad_uncertainty,
                           const Tensor& features, const Tensor& logits, bool channels_last, Tensor grad_features,
                           Tensor grad_logits) {
  const Shape shape = make_shape(features, logits, channels_last);
  const Views views{features, shape};
  Backward work{shape,
                {},
                {},
                views.of_features(features, readable(features)),
                views.of_logits(logits, readable(logits)),
                views.of_features(grad_features, grad_features.mutable_data_ptr()),
                views.of_logits(grad_logits, grad_logits.mutable_data_ptr())};
  if (grad_gated && shape.channels > 0) work.grad_gated = views.of_features(*grad_gated, readable(*grad_gated));
  if (grad_uncertainty) work.grad_uncertainty = views.of_uncertainty(*grad_uncertainty, readable(*grad_uncertainty));
  launch_any(work, features);
}

}  // namespace
}  // namespace csf::entropy_gate::cuda

STABLE_TORCH_LIBRARY_IMPL(contrastseg_fast, CUDA, m) {
  m.impl("entropy_gate_forward_launch", TORCH_BOX(&csf::entropy_gate::cuda::entropy_gate_forward));
  m.impl("entropy_gate_backward_launch", TORCH_BOX(&csf::entropy_gate::cuda::entropy_gate_backward));
}
