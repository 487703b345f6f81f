#include "cuda/nvrtc.h"

#include <dlfcn.h>

#include <algorithm>
#include <mutex>
#include <utility>

namespace flash::cuda {
namespace {

std::mutex directories_mutex;
std::vector<std::string> directories;  // guarded by directories_mutex

struct Nvrtc : NvrtcApi {
  int major = 0, minor = 0;
};

// Drivers run machine code of their own major version's compilers and of older ones.
std::vector<std::string> sonames() {
  std::vector<std::string> names = {"libnvrtc.so.13", "libnvrtc.so.12"};
  try {
    if (driver_version().starts_with("12.")) std::swap(names[0], names[1]);
  } catch (const Error&) {  // no driver: the machine code is for another machine
  }
  return names;
}

// NVRTC finds its library of built-in functions only where the system looks. Here it is found beside NVRTC too, as in
// Python packages: what is loaded already is found by its name.
void load_builtins(const std::string& path_of_nvrtc, int major, int minor) {
  const std::string folder = path_of_nvrtc.substr(0, path_of_nvrtc.rfind('/') + 1);
  const std::string version = std::to_string(major) + "." + std::to_string(minor);
  if (!folder.empty()) dlopen((folder + "libnvrtc-builtins.so." + version).c_str(), RTLD_NOW | RTLD_LOCAL);
}

void* open_library() {
  const std::vector<std::string> names = sonames();
  // First the one that JAX has loaded.
  for (const std::string& name : names)
    if (void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD)) return library;
  std::lock_guard lock(directories_mutex);
  for (const std::string& name : names)
    for (const std::string& directory : directories)
      if (void* library = dlopen((directory + "/" + name).c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
  for (const std::string& name : names)
    if (void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
  throw Error(Error::Code::kFailedPrecondition,
              "NVRTC, CUDA's run-time compiler, was not found: install it with `pip install \"jax[cuda13]\"` or "
              "`pip install \"jax[cuda12]\"`, which bring nvidia-cuda-nvrtc");
}

Nvrtc open_nvrtc() {
  void* library = open_library();
  Nvrtc api;
#define FLASH_LOAD(result, name, ...)                                            \
  if (!(api.name = reinterpret_cast<decltype(api.name)>(dlsym(library, #name)))) \
    throw Error(Error::Code::kFailedPrecondition, "NVRTC lacks " #name ": upgrade it to one of CUDA 12 or later");
  FLASH_NVRTC_FUNCTIONS(FLASH_LOAD)
#undef FLASH_LOAD
  api.nvrtcVersion(&api.major, &api.minor);
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(api.nvrtcVersion), &info) && info.dli_fname)
    load_builtins(info.dli_fname, api.major, api.minor);
  return api;
}

const Nvrtc& nvrtc() {
  static const Nvrtc api = open_nvrtc();
  return api;
}

void check_nvrtc(int result, const char* name) {
  if (result)
    throw Error(Error::Code::kInternal,
                std::string(name) + " of NVRTC " + nvrtc_version() + " failed: " + nvrtc().nvrtcGetErrorString(result));
}

bool knows(const Arch& arch) {
  int count = 0;
  check_nvrtc(nvrtc().nvrtcGetNumSupportedArchs(&count), "nvrtcGetNumSupportedArchs");
  std::vector<int> archs(count);
  check_nvrtc(nvrtc().nvrtcGetSupportedArchs(archs.data()), "nvrtcGetSupportedArchs");
  return std::find(archs.begin(), archs.end(), arch.sm) != archs.end();
}

struct ProgramDeleter {
  Program program = nullptr;
  ~ProgramDeleter() { nvrtc().nvrtcDestroyProgram(&program); }
};

}  // namespace

void set_nvrtc_directories(std::vector<std::string> new_directories) {
  std::lock_guard lock(directories_mutex);
  directories = std::move(new_directories);
}

std::string nvrtc_version() {
  return std::to_string(nvrtc().major) + "." + std::to_string(nvrtc().minor);
}

Compiled nvrtc_compile(const std::string& source, const std::map<std::string, std::string>& headers, const Arch& arch,
                       const std::vector<std::string>& options) {
  const Nvrtc& api = nvrtc();
  if (!knows(arch))
    throw Error(Error::Code::kFailedPrecondition, "NVRTC " + nvrtc_version() + " cannot compile for " + name_of(arch) +
                                                      ": upgrade it with `pip install "
                                                      "--upgrade nvidia-cuda-nvrtc" +
                                                      (api.major == 12 ? "-cu12" : "") + "`");
  std::vector<const char*> texts, names;
  for (const auto& [name, text] : headers) {
    names.push_back(name.c_str());
    texts.push_back(text.c_str());
  }
  const std::string arch_option = "-arch=" + name_of(arch);
  std::vector<const char*> arguments = {arch_option.c_str()};
  for (const std::string& option : options) arguments.push_back(option.c_str());

  ProgramDeleter owner;
  check_nvrtc(api.nvrtcCreateProgram(&owner.program, source.c_str(), "jax_flash.cu", int(headers.size()), texts.data(),
                                     names.data()),
              "nvrtcCreateProgram");
  const int result = api.nvrtcCompileProgram(owner.program, int(arguments.size()), arguments.data());
  Compiled out;
  size_t size = 0;
  if (api.nvrtcGetProgramLogSize(owner.program, &size) == 0 && size > 1) {
    out.log.resize(size);
    api.nvrtcGetProgramLog(owner.program, out.log.data());
    out.log.pop_back();  // the terminating zero
  }
  if (result == kErrorCompilation) return out;
  if (result && !out.log.empty())
    throw Error(Error::Code::kInternal, "NVRTC " + nvrtc_version() + " failed: " + out.log);
  check_nvrtc(result, "nvrtcCompileProgram");
  check_nvrtc(api.nvrtcGetCUBINSize(owner.program, &size), "nvrtcGetCUBINSize");
  out.cubin.resize(size);
  check_nvrtc(api.nvrtcGetCUBIN(owner.program, out.cubin.data()), "nvrtcGetCUBIN");
  return out;
}

}  // namespace flash::cuda
