// A device for torch that is not the processor and has no hardware: its memory is main memory, and torch's kernels for
// the processor compute on it. As on a GPU, its tensors do not mix with those of the processor, and to read is to wait.
//
// Modes, for tests (see __init__.py): waits raise; work is being captured into a graph; fused kernels ignore the factor
// of the gradients, as Metal's did; there are no fused kernels.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>
#include <atomic>
#include <cstring>
#include <set>
using namespace at;

constexpr auto EMULATED = c10::DeviceType::PrivateUse1;
constexpr auto KEYS = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
constexpr int DEVICES = 2;
enum Mode { RAISES = 0, CAPTURES = 1, IGNORES_FACTOR = 2, LACKS_FUSED = 3, MODES = 4 };
static bool modes[MODES] = {};
static std::atomic<int64_t> waits{0};
static thread_local int current = 0;

// ---- memory and devices

static void release(void* memory) { c10::free_cpu(memory); }

struct DeviceMemory final : c10::Allocator {
  DataPtr allocate(size_t bytes) override {
    void* memory = c10::alloc_cpu(bytes ? bytes : 1);
    return {memory, memory, &release, Device(EMULATED, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const final { default_copy_data(to, from, bytes); }
};
static DeviceMemory device_memory;
REGISTER_ALLOCATOR(EMULATED, &device_memory)

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return EMULATED; }
  Device exchangeDevice(Device device) const override {
    auto old = current;
    setDevice(device);
    return Device(EMULATED, old);
  }
  Device getDevice() const override { return Device(EMULATED, current); }
  void setDevice(Device device) const override { if (device.index() >= 0) current = device.index(); }
  void uncheckedSetDevice(Device device) const noexcept override { if (device.index() >= 0) current = device.index(); }
  Stream getStream(Device device) const override {
    return Stream(Stream::DEFAULT, Device(EMULATED, device.index() < 0 ? current : device.index()));
  }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream getNewStream(Device device, int) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  void record(void**, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return DEVICES; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex device) const override { current = device; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { auto old = current; current = device; return old; }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override {
    auto old = current;
    if (device >= 0) current = device;
    return old;
  }
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    static Generator generator = at::detail::getDefaultCPUGenerator();
    return generator;
  }
  Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto memory = device_memory.allocate(bytes);
    std::memcpy(memory.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(memory));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};
static Hooks hooks;
static const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

// ---- the same memory, as a tensor of the processor and of the device

static Tensor as_cpu(const Tensor& tensor) {
  auto seen = at::from_blob(const_cast<void*>(tensor.const_data_ptr()), tensor.sizes(), tensor.strides(),
                            tensor.options().device(kCPU).requires_grad(false));
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) seen.unsafeGetTensorImpl()->set_wrapped_number(true);
  return seen;
}

static Tensor as_emulated(const Tensor& tensor, int index) {
  auto* kept = new Tensor(tensor);
  DataPtr memory(tensor.storage().mutable_data(), kept, [](void* k) { delete static_cast<Tensor*>(k); },
                 Device(EMULATED, index));
  c10::Storage storage(c10::Storage::use_byte_size_t{}, tensor.storage().nbytes(), std::move(memory),
                       &device_memory, true);
  auto seen = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), KEYS, tensor.dtype());
  seen.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) seen.unsafeGetTensorImpl()->set_wrapped_number(true);
  return seen;
}

static bool is_emulated(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == EMULATED; }

static void wait(const std::string& what) {
  waits++;
  TORCH_CHECK(!modes[RAISES], "called a synchronizing operation: ", what);
  TORCH_CHECK(!modes[CAPTURES], "operation not permitted when stream is capturing: ", what);
}

static void resize_memory(const Tensor& tensor, IntArrayRef sizes) {
  auto* impl = tensor.unsafeGetTensorImpl();
  size_t needed = (c10::multiply_integers(sizes) + impl->storage_offset()) * tensor.element_size();
  if (tensor.storage().nbytes() < needed) hooks.resizePrivateUse1Bytes(tensor.storage(), needed);
  impl->set_sizes_contiguous(sizes);
}

// ---- every operator that is not below: the processor's, on the same memory

static bool begins(const std::string& text, const char* with) { return text.rfind(with, 0) == 0; }
static const std::set<std::string> READING = {
    "aten::equal", "aten::is_nonzero", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::item",
    "aten::unique_dim", "aten::unique_consecutive"};

static void by_the_processor(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto name = schema.name();
  const auto number = schema.arguments().size();
  const auto begin = stack->size() - number;
  int index = -1;
  bool cpu_array = false, cpu_any = false;
  auto look = [&](const Tensor& tensor) {
    if (!tensor.defined()) return;
    if (is_emulated(tensor)) {
      TORCH_CHECK(index < 0 || index == tensor.device().index() || tensor.dim() == 0,
                  "Expected all tensors to be on the same device, ", name);
      if (index < 0 || tensor.dim()) index = tensor.device().index();
    } else {
      cpu_any = true;
      if (tensor.dim()) cpu_array = true;
    }
  };
  for (size_t i = begin; i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isTensor()) look(value.toTensor());
    else if (value.isTensorList()) for (const Tensor& tensor : value.toTensorVector()) look(tensor);
    else if (value.isOptionalTensorList()) {
      for (const auto& tensor : value.toOptionalTensorVector()) if (tensor) look(*tensor);
    }
  }
  TORCH_CHECK(!(index >= 0 && cpu_array), "Expected all tensors to be on the same device, but found cpu in ", name);
  const bool fused = begins(name, "aten::_fused_");
  TORCH_CHECK(!(index >= 0 && cpu_any && (name == "aten::cat" || name == "aten::stack" || fused)),
              "Expected all tensors to be on the same device: ", name);
  TORCH_CHECK_NOT_IMPLEMENTED(!(fused && modes[LACKS_FUSED]), "Could not run ", name);
  if (READING.count(name)) wait(name);
  std::vector<c10::IValue> saved(stack->begin() + begin, stack->end());
  for (size_t i = begin; i < stack->size(); i++) {
    auto& value = (*stack)[i];
    const auto& argument = schema.arguments()[i - begin];
    if (fused && modes[IGNORES_FACTOR] && (argument.name() == "grad_scale" || argument.name() == "found_inf")) {
      value = c10::IValue();
    } else if (value.isTensor()) {
      auto tensor = value.toTensor();
      const auto* alias = argument.alias_info();
      if (is_emulated(tensor)) {
        value = alias && alias->isWrite() && tensor.numel() == 0
            ? at::empty({0}, tensor.options().device(kCPU).requires_grad(false)) : as_cpu(tensor);
      }
    } else if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(is_emulated(tensor) ? as_cpu(tensor) : tensor);
      value = c10::IValue(c10::List<Tensor>(list));
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const auto& tensor : value.toOptionalTensorVector()) {
        list.push_back(tensor && is_emulated(*tensor) ? std::optional<Tensor>(as_cpu(*tensor)) : tensor);
      }
      value = list;
    } else if (value.isDevice() && value.toDevice().type() == EMULATED) {
      value = c10::Device(kCPU);
    }
  }
  op.callBoxed(stack);
  const auto& returns = schema.returns();
  const auto first = stack->size() - returns.size();
  for (size_t r = 0; r < returns.size(); r++) {
    auto& value = (*stack)[first + r];
    const auto* alias = returns[r].alias_info();
    if (alias && alias->isWrite()) {  // in place: what it wrote to is what it returns
      for (size_t a = 0; a < number; a++) {
        const auto* from = schema.arguments()[a].alias_info();
        if (!from || !from->isWrite() || from->beforeSets() != alias->beforeSets()) continue;
        if (value.isTensor() && saved[a].isTensor()) {
          auto written = saved[a].toTensor(), now = value.toTensor();
          if (is_emulated(written) && written.sizes() != now.sizes()) {
            resize_memory(written, now.sizes());
            as_cpu(written).copy_(now);
          }
        }
        value = saved[a];
        break;
      }
    } else if (value.isTensor()) {
      auto tensor = value.toTensor();
      if (tensor.defined() && index >= 0) value = as_emulated(tensor, index);
    } else if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(as_emulated(tensor, index));
      value = c10::IValue(c10::List<Tensor>(list));
    }
  }
}

// ---- what makes, views, copies and reads memory

static Tensor make_empty(c10::SymIntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>,
                    std::optional<Device> device, std::optional<bool>, std::optional<MemoryFormat> format) {
  int old = current;
  if (device && device->index() >= 0) current = device->index();
  auto made = at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &device_memory, KEYS, dtype_or_default(dtype),
                                        format);
  current = old;
  return made;
}

static Tensor make_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<ScalarType> dtype,
                            std::optional<Layout>, std::optional<Device> device, std::optional<bool>) {
  int old = current;
  if (device && device->index() >= 0) current = device->index();
  auto made = at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                                &device_memory, KEYS, dtype_or_default(dtype));
  current = old;
  return made;
}

static Tensor copy_from(const Tensor& self, const Tensor& target, bool non_blocking) {
  const bool from = is_emulated(self), to = is_emulated(target);
  if (from && !to && !non_blocking) wait("device to host copy");
  if (!from && to && !non_blocking) wait("blocking host to device copy");
  (to ? as_cpu(target) : target).copy_(from ? as_cpu(self) : self);
  return target;
}

static Tensor copy_from_and_resize(const Tensor& self, const Tensor& target) {
  if (target.numel() == 0) target.resize_(self.sizes());
  return copy_from(self, target, false);
}

static Scalar local_scalar(const Tensor& tensor) {
  wait("_local_scalar_dense");
  return as_cpu(tensor).item();
}

static Tensor& set_storage(Tensor& tensor, Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                           c10::SymIntArrayRef stride) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(storage);
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return tensor;
}

static Tensor& set_whole_storage(Tensor& tensor, Storage storage) {
  auto* impl = tensor.unsafeGetTensorImpl();
  int64_t number = storage.nbytes() / tensor.element_size();
  impl->set_storage_keep_dtype(storage);
  impl->set_storage_offset(0);
  impl->set_sizes_contiguous({number});
  return tensor;
}

static Tensor see_strided(const Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                         std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt);
}

static Tensor see_view(const Tensor& tensor, c10::SymIntArrayRef size) {
  return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(size));
}

static Tensor reshape_alias(const Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

static const Tensor& set_size(const Tensor& tensor, c10::SymIntArrayRef size, std::optional<MemoryFormat>) {
  resize_memory(tensor, C10_AS_INTARRAYREF_SLOW(size));
  return tensor;
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_the_processor>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", TORCH_FN(make_empty));
  m.impl("empty_strided", TORCH_FN(make_strided));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  m.impl("_local_scalar_dense", TORCH_FN(local_scalar));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("set_.source_Storage", TORCH_FN(set_whole_storage));
  m.impl("as_strided", TORCH_FN(see_strided));
  m.impl("view", TORCH_FN(see_view));
  m.impl("_reshape_alias", TORCH_FN(reshape_alias));
  m.impl("resize_", TORCH_FN(set_size));
  // torch would make loops over tensors of these, and refuse the fused ones
  for (const auto& each : c10::Dispatcher::singleton().getAllOpNames()) {
    const bool whole = begins(each.name, "aten::_foreach_") || begins(each.name, "aten::_fused_adam") ||
                       begins(each.name, "aten::_fused_sgd") || begins(each.name, "aten::_amp_");
    if (!whole || each.overload_name.find("out") != std::string::npos) continue;
    auto full = each.name.substr(6) + (each.overload_name.empty() ? "" : "." + each.overload_name);
    try {
      m.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&by_the_processor>());
    } catch (const std::exception&) {  // an operator that has no overload of this name any more
    }
  }
}

static int64_t count_waits() { return waits.load(); }
static void set_mode(int64_t which, bool on) { modes[which] = on; }
static bool get_mode(int64_t which) { return modes[which]; }

TORCH_LIBRARY(emulated, m) {
  m.def("count_waits() -> int", &count_waits);
  m.def("set_mode(int which, bool on) -> ()", &set_mode);
  m.def("mode(int which) -> bool", &get_mode);
}
