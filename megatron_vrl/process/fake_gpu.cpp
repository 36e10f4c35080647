// A GPU for torch's autograd engine that computes nothing: one device, no memory, no queue.
// A CPU build of torch refuses the backward pass of fake CUDA tensors without it. A CUDA build has
// such a guard itself (c10/core/impl/DeviceGuardImplInterface.h, ensureCUDADeviceGuardSet).
//
// It also names the kernels that a CUDA build has, where torch would otherwise take another path:
// a fused operation, and not the sequence of operations that stands in for it.
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace at {
struct CUDAHooks : public CUDAHooksInterface {  // torch looks the class up by this name
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  DeviceIndex deviceCount() const override { return 1; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

struct Guard : public c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  static c10::Device only() { return c10::Device(c10::DeviceType::CUDA, 0); }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, only()); }
  c10::Device exchangeDevice(c10::Device) const override { return only(); }
  c10::Device getDevice() const override { return only(); }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// Kernel that no fake tensor calls: fake tensors run the kernel of the `Meta` key.
static void never(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK(false, op.schema().name(), " has no kernel on the fake GPU.");
}

// All operations of ATen that torch 2.13+cu130 computes by a kernel of their own, and a CPU build
// by a sequence of others: mish_backward, which nothing here calls, and these two.
TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("_fused_rms_norm", torch::CppFunction::makeFromBoxedFunction<&never>());
  library.impl("silu_backward", torch::CppFunction::makeFromBoxedFunction<&never>());
}

// Choice of a GPU for scaled_dot_product_attention (cuda/sdp_utils.cpp): FlashAttention in 16 bits,
// cuDNN with a mask; in float32 the memory-efficient kernel, which has no fewer key heads.
static int64_t attention_choice(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor&,
    const std::optional<at::Tensor>& mask, double, bool, std::optional<double>, bool) {
  using sdp::SDPBackend;
  if (query.scalar_type() != at::kFloat)
    return int64_t(mask ? SDPBackend::cudnn_attention : SDPBackend::flash_attention);
  bool fewer = query.sym_size(-3) != key.sym_size(-3);
  return int64_t(fewer ? SDPBackend::math : SDPBackend::efficient_attention);
}
static at::native::RegisterCUDADispatch<at::native::_fused_sdp_choice_stub_DECLARE_DISPATCH_type>
    choice(at::native::_fused_sdp_choice_stub, &attention_choice);
