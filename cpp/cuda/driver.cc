#include "cuda/driver.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>

namespace flash::cuda {
namespace {

constexpr int32 kOldestSm = 80;

DriverApi open_driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library)
    throw Error(Error::Code::kFailedPrecondition,
                "the CUDA driver (libcuda.so.1) was not found: install NVIDIA's driver, or start the container with "
                "access to its GPUs");
  DriverApi api;
#define FLASH_LOAD(result, name, ...)                                            \
  if (!(api.name = reinterpret_cast<decltype(api.name)>(dlsym(library, #name)))) \
    throw Error(Error::Code::kFailedPrecondition,                                \
                "the CUDA driver lacks " #name ": upgrade it to one of CUDA 12.0 or later");
  FLASH_DRIVER_FUNCTIONS(FLASH_LOAD)
#undef FLASH_LOAD
  if (const int result = api.cuInit(0)) {
    const char* text = nullptr;
    api.cuGetErrorString(result, &text);
    throw Error(Error::Code::kFailedPrecondition,
                std::string("the CUDA driver does not start: ") + (text ? text : "unknown error"));
  }
  return api;
}

// 13000 is CUDA 13.0.
int driver_version_number() {
  int version = 0;
  check_driver(driver().cuDriverGetVersion(&version), "cuDriverGetVersion");
  return version;
}

struct Device {
  int32 sm;
  int32 multiprocessors;
};

int32 attribute_of(int device, int attribute) {
  int value = 0;
  check_driver(driver().cuDeviceGetAttribute(&value, attribute, device), "cuDeviceGetAttribute");
  return value;
}

// XLA's device ordinals are the driver's. Never destroyed: threads of XLA may outlive static objects.
const std::vector<Device>& devices() {
  static const std::vector<Device>& devices = *[] {
    int count = 0;
    check_driver(driver().cuDeviceGetCount(&count), "cuDeviceGetCount");
    auto found = std::make_unique<std::vector<Device>>(count);
    for (int i = 0; i < count; ++i) {
      int device = 0;
      check_driver(driver().cuDeviceGet(&device, i), "cuDeviceGet");
      (*found)[i].sm =
          10 * attribute_of(device, kComputeCapabilityMajor) + attribute_of(device, kComputeCapabilityMinor);
      (*found)[i].multiprocessors = attribute_of(device, kMultiprocessorCount);
    }
    return found.release();
  }();
  return devices;
}

const Device& device_at(int32 device) {
  if (device < 0 || size_t(device) >= devices().size())
    throw Error(Error::Code::kInternal, "there is no GPU " + std::to_string(device));
  return devices()[device];
}

// By table rather than from the device, so that kernels compiled ahead of time are those that the device asks for.
Arch arch_of_sm(int32 sm) {
  if (sm < kOldestSm)
    throw Error(Error::Code::kUnimplemented, "GPUs of compute capability " + std::to_string(sm / 10) + "." +
                                                 std::to_string(sm % 10) +
                                                 " are not supported: the oldest is 8.0 (Ampere)");
  const int32 major = sm / 10;
  if (sm == 80 || sm == 87) return {sm, 166912};
  if (major == 9 || major == 10 || major == 11) return {sm, 232448};
  return {sm, 101376};  // 8.6, 8.9 and 12.x, and the least of all for what is not known yet
}

}  // namespace

const DriverApi& driver() {
  static const DriverApi api = open_driver();
  return api;
}

void check_driver(int result, const char* name) {
  if (result == 0) return;
  const char *error = nullptr, *text = nullptr;
  driver().cuGetErrorName(result, &error);
  driver().cuGetErrorString(result, &text);
  throw Error(Error::Code::kInternal, std::string(name) + " failed with " + (error ? error : std::to_string(result)) +
                                          (text ? std::string(": ") + text : std::string()));
}

std::string driver_version() {
  const int version = driver_version_number();
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

Arch arch_from_name(const std::string& name) {
  int32 sm = 0;
  std::string digits = name.starts_with("sm_") ? name.substr(3) : "";
  if (digits.ends_with('a')) digits.pop_back();
  const bool is_number = !digits.empty() && digits.size() <= 3 &&
                         std::all_of(digits.begin(), digits.end(), [](char c) { return '0' <= c && c <= '9'; });
  if (is_number) sm = std::stoi(digits);
  if (sm < 10)
    throw Error(Error::Code::kUnimplemented,
                "\"" + name + "\" is no GPU architecture: give its compute capability, as in sm_80 or sm_90");
  return arch_of_sm(sm);
}

std::string name_of(const Arch& arch) {
  return "sm_" + std::to_string(arch.sm) + (arch.sm >= 90 ? "a" : "");
}

std::vector<Arch> visible_archs() {
  std::vector<Arch> archs;
  std::optional<Error> too_old;
  try {
    driver();
  } catch (const Error&) {
    return archs;
  }
  for (const Device& device : devices()) {
    try {
      const Arch arch = arch_of_sm(device.sm);
      if (std::find(archs.begin(), archs.end(), arch) == archs.end()) archs.push_back(arch);
    } catch (const Error& error) {
      too_old = error;
    }
  }
  if (archs.empty() && too_old) throw *too_old;
  return archs;
}

Arch arch_of(int32 device) {
  return arch_of_sm(device_at(device).sm);
}

int32 multiprocessors_of(int32 device) {
  return device_at(device).multiprocessors;
}

bool can_start_early(int32 device) {
  static const bool in_graphs = driver_version_number() >= 12030;
  return in_graphs && device_at(device).sm >= 90;
}

void launch(Function function, int64 grid_x, int32 threads, int64 shared_bytes, Stream stream, const void* params,
            bool starts_early) {
  if (grid_x == 0) return;
  check_count(grid_x);
  void* arguments[] = {const_cast<void*>(params)};
  const LaunchAttribute attribute = {kEarlyStart, {}, 1, {}};
  const LaunchConfig config = {unsigned(grid_x),       1,      1,          unsigned(threads), 1, 1,
                               unsigned(shared_bytes), stream, &attribute, starts_early};
  check_driver(driver().cuLaunchKernelEx(&config, function, arguments, nullptr), "cuLaunchKernelEx");
}

void set_zero(void* data, int64 bytes, Stream stream) {
  if (bytes == 0) return;
  check_driver(driver().cuMemsetD8Async(DevicePointer(reinterpret_cast<uintptr_t>(data)), 0, size_t(bytes), stream),
               "cuMemsetD8Async");
}

}  // namespace flash::cuda
