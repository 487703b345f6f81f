#include "cuda/jit.h"

#include <atomic>
#include <cctype>
#include <chrono>
#include <cstdio>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <unordered_map>
#include <utility>

#include "cuda/disk_cache.h"
#include "cuda/nvrtc.h"

namespace flash::cuda {
namespace {

// A field's value as source text.
std::string literal(bool x) {
  return x ? "true" : "false";
}
std::string literal(int32 x) {
  return std::to_string(x);
}
std::string literal(Direction x) {
  return x == Direction::kFwd   ? "flash::Direction::kFwd"
         : x == Direction::kBwd ? "flash::Direction::kBwd"
                                : "flash::Direction::kDbias";
}
std::string literal(Family x) {
  return x == Family::kSm80 ? "flash::Family::kSm80" : "flash::Family::kSm90";
}
std::string literal(DType x) {
  return x == DType::kBF16 ? "flash::DType::kBF16" : x == DType::kF16 ? "flash::DType::kF16" : "flash::DType::kF32";
}

// As in names of files and entry points.
std::string name_of(Direction direction) {
  return direction == Direction::kFwd ? "fwd" : direction == Direction::kBwd ? "bwd" : "dbias";
}

std::string entry_point(const std::string& name, const std::string& bounds, const std::string& problem,
                        const std::string& kernel, int32 cluster = 1) {
  const std::string cluster_dims = cluster > 1 ? "__cluster_dims__(" + std::to_string(cluster) + ") " : "";
  return "\nextern \"C\" __global__ void " + cluster_dims + "__launch_bounds__(" + bounds + ")\n" + name +
         "(const __grid_constant__ flash::" + problem + " p) {\n  flash::" + kernel + "<kConfig>(p);\n}\n";
}

// For people: messages and file names.
std::string title_of(const KernelConfig& config, const Arch& arch) {
  const char* dtype = config.dtype == DType::kBF16 ? "bf16" : config.dtype == DType::kF16 ? "f16" : "f32";
  return name_of(config.direction) + "_" + dtype + "_" + std::to_string(config.head_dim) + "x" +
         std::to_string(config.head_dim_v) + "_" + name_of(arch);
}

struct Cubin {
  std::string bytes;
  bool from_disk;
};

std::string key_of(const std::string& source, const Arch& arch) {
  static const Hash sources = [] {
    Hash hash;
    for (const auto& [name, text] : kernel_sources()) {
      hash.add(name);
      hash.add(text);
    }
    return hash;
  }();
  Hash hash = sources;
  hash.add(source);
  hash.add(name_of(arch));
  hash.add(nvrtc_version());
  for (const std::string& option : compile_options()) hash.add(option);
  return hash.hex();
}

Cubin compile_source(const KernelConfig& config, const Arch& arch, const std::string& source, const std::string& key) {
  const auto start = std::chrono::steady_clock::now();
  Compiled compiled = nvrtc_compile(source, kernel_sources(), arch, compile_options());
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  const std::string title = title_of(config, arch), file = title + "_" + key.substr(0, 8);
  dump(file + ".cu", source);
  dump(file + ".log", compiled.log);
  dump(file + ".cubin", compiled.cubin);
  if (compiled.cubin.empty())
    throw Error(Error::Code::kInternal, "kernel " + title + " does not compile with NVRTC " + nvrtc_version() +
                                            ", please report this:\n" + compiled.log);
  char text[32];
  std::snprintf(text, sizeof text, "%.2f s", seconds.count());
  log("compiled " + title + " in " + text + " (" + key + ")");
  write_cache(key, compiled.cubin);
  return {std::move(compiled.cubin), false};
}

Cubin find_or_compile(const KernelConfig& config, const Arch& arch) {
  const std::string source = source_of(config), key = key_of(source, arch);
  if (auto bytes = read_cache(key)) {
    log("read " + title_of(config, arch) + " from the cache (" + key + ")");
    return {std::move(*bytes), true};
  }
  return compile_source(config, arch, source, key);
}

// The library stays loaded for the life of the process.
Kernels load_cubin(const KernelConfig& config, int32 device, const std::string& cubin) {
  const DriverApi& api = driver();
  Library library = nullptr;
  check_driver(api.cuLibraryLoadData(&library, cubin.data(), nullptr, nullptr, 0, nullptr, nullptr, 0),
               "cuLibraryLoadData");
  struct Unload {
    const DriverApi& api;
    Library library;
    ~Unload() {
      if (library) api.cuLibraryUnload(library);
    }
  } unload{api, library};
  Kernels kernels = {};
  int32 i = 0;
  for (const std::string& name : entry_points(config)) {
    Kernel kernel = nullptr;
    check_driver(api.cuLibraryGetKernel(&kernel, library, name.c_str()), "cuLibraryGetKernel");
    if (i == main_entry(config))
      check_driver(api.cuKernelSetAttribute(kMaxDynamicSharedSizeBytes, int(shared_bytes(config)), kernel, device),
                   "cuKernelSetAttribute");
    // Not the kernel itself, though that can be launched too: this loads the code now, not at the first launch, which
    // may be under capture.
    check_driver(api.cuKernelGetFunction(&kernels.entry[i++], kernel), "cuKernelGetFunction");
  }
  unload.library = nullptr;
  return kernels;
}

struct Key {
  KernelConfig config;
  int32 target;  // architecture or device

  bool operator==(const Key&) const = default;
};

struct KeyHash {
  size_t operator()(const Key& key) const {
    uint64 hash = uint64(key.target);
    for_each_field(key.config, [&](const char*, auto value) { hash = mixed(hash, uint64(value)); });
    return size_t(hash);
  }
};

// Values that are made once and kept. Callers of one key wait for the first of them, those of other keys do not; after
// a failure the next caller tries again.
template <class Value>
class Memo {
 public:
  template <class Make>
  const Value& get(const Key& key, Make make) {
    Slot& slot = slot_of(key);
    if (!slot.ready.load(std::memory_order_acquire)) {
      std::lock_guard lock(slot.mutex);
      if (!slot.ready.load(std::memory_order_relaxed)) {
        slot.value = make();
        slot.ready.store(true, std::memory_order_release);
      }
    }
    return slot.value;
  }

 private:
  struct Slot {
    std::mutex mutex;
    std::atomic<bool> ready = false;
    Value value;
  };

  Slot& slot_of(const Key& key) {
    {
      std::shared_lock lock(mutex_);
      if (auto it = slots_.find(key); it != slots_.end()) return it->second;
    }
    std::unique_lock lock(mutex_);
    return slots_[key];
  }

  std::shared_mutex mutex_;
  std::unordered_map<Key, Slot, KeyHash> slots_;  // its elements never move
};

// Never destroyed: threads of XLA may outlive static objects.
const Cubin& cubin_of(const KernelConfig& config, const Arch& arch) {
  static Memo<Cubin>& cubins = *new Memo<Cubin>;
  return cubins.get({config, arch.sm}, [&] { return find_or_compile(config, arch); });
}

}  // namespace

std::string source_of(const KernelConfig& config) {
  const bool backward = config.direction == Direction::kBwd, hopper = config.family == Family::kSm90;
  const std::string family = hopper ? "sm90" : "sm80", direction = name_of(config.direction);
  std::string text;
  if (backward) text += "#include \"kernels/bwd_postprocess.cuh\"\n#include \"kernels/bwd_preprocess.cuh\"\n";
  text += "#include \"kernels/" + family + "/" + direction + ".cuh\"\n";
  text += "\nconstexpr flash::KernelConfig kConfig{\n";
  for_each_field(config, [&](const char* name, auto value) {
    text += std::string("    .") + name + " = " + literal(value) + ",\n";
  });
  text += "};\n";
  const std::vector<std::string> names = entry_points(config);
  std::string problem = direction + "Problem";
  problem[0] = char(std::toupper(problem[0]));
  const std::string main =
      entry_point(names[main_entry(config)], "flash::num_threads(kConfig), kConfig.min_blocks",
                  (hopper ? "Hopper" : "") + problem, family + "::" + direction, cluster_size(config));
  if (names.size() == 1) return text + main;
  if (!backward)
    return text + entry_point(names[0], "flash::kFwdPrepareThreads", "FwdProblem", "sm90::fwd_prepare") + main;
  return text + entry_point(names[0], "flash::kRowKernelThreads", "BwdProblem", "bwd_preprocess") + main +
         entry_point(names[2], "flash::kRowKernelThreads", "BwdProblem", "bwd_postprocess");
}

const std::vector<std::string>& compile_options() {
  static const std::vector<std::string> options = {"--std=c++20", "--device-as-default-execution-space", "-ftz=true",
                                                   "-prec-div=false", "-prec-sqrt=false"};
  return options;
}

std::vector<std::string> entry_points(const KernelConfig& config) {
  const std::string main = "jax_flash_" + name_of(config.direction);
  if (config.direction == Direction::kBwd) return {main + "_preprocess", main, main + "_postprocess"};
  if (main_entry(config) == 1) return {main + "_prepare", main};
  return {main};
}

void compile(const KernelConfig& config, const Arch& arch) {
  cubin_of(config, arch);
}

const Kernels& load(const KernelConfig& config, int32 device) {
  static Memo<Kernels>& loaded = *new Memo<Kernels>;
  return loaded.get({config, device}, [&] {
    const Arch arch = arch_of(device);
    const Cubin& cubin = cubin_of(config, arch);
    try {
      return load_cubin(config, device, cubin.bytes);
    } catch (const Error& error) {
      if (!cubin.from_disk) throw;
      log(std::string("compiles again what the driver refuses: ") + error.what());
    }
    const std::string source = source_of(config);
    return load_cubin(config, device, compile_source(config, arch, source, key_of(source, arch)).bytes);
  });
}

}  // namespace flash::cuda
