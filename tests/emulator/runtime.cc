// The emulated GPU's place in the process: what cpp/cuda/driver.cc and nvrtc.cc offer, with g++ as the compiler and the
// CPU as the device, and handlers through which XLA's CPU client calls it. Linked with the rest of cpp/cuda and
// cpp/ffi, unchanged.
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/attention.h"
#include "cuda/disk_cache.h"
#include "cuda/heuristics.h"
#include "cuda/jit.h"
#include "cuda/nvrtc.h"
#include "ffi/decode.h"
#include "tensor_boxes.h"

namespace fs = std::filesystem;

namespace flash::cuda {
namespace {

Arch emulated_arch;
int64 blocks_of_last_launch;
std::mutex mutex;  // one launch at a time: the state of an emulated GPU is global

using Entry = const char* (*)(unsigned blocks, unsigned threads, unsigned bytes, const void* problem);

// A way in for each entry point of a translation unit, and the shared memory that its kernels declare, of all blocks of
// a cluster. The main entry point runs in clusters.
std::string harness_of(const std::string& source) {
  const std::string family = source.find("kernels/sm90/") != source.npos ? "sm90" : "sm80";
  std::string text = "\nnamespace flash::" + family +
                     " {\nalignas(1024) char shared[flash::cluster_size(kConfig) * emulator::kSharedCapacity];\n}\n";
  for (const Direction direction : {Direction::kFwd, Direction::kBwd, Direction::kDbias}) {
    KernelConfig config = {};
    config.direction = direction;
    config.family = family == "sm90" ? Family::kSm90 : Family::kSm80;
    const std::vector<std::string> names = entry_points(config);
    for (const std::string& name : names) {
      if (source.find(name + "(const") == source.npos) continue;
      const std::string cluster = name == names[main_entry(config)] ? "flash::cluster_size(kConfig)" : "1";
      text += "extern \"C\" const char* emulated_" + name +
              "(unsigned blocks, unsigned threads, unsigned bytes, const void* problem) {\n  return emulator::launch(" +
              name + ", blocks, threads, bytes, flash::" + family + "::shared, emulator::kSharedCapacity, problem, " +
              cluster + ");\n}\n";
    }
  }
  return text;
}

}  // namespace

std::string nvrtc_version() {
  return EMULATOR_VERSION;
}

// The "cubin" is the name of a shared library in the cache.
Compiled nvrtc_compile(const std::string& source, const std::map<std::string, std::string>& headers, const Arch&,
                       const std::vector<std::string>&) {
  fs::create_directories(cache_directory());
  std::string folder = cache_directory() + "/kernel_XXXXXX";
  if (!mkdtemp(folder.data())) throw Error(Error::Code::kInternal, "cannot write to " + cache_directory());
  // ptx.h stands for all of kernels/ptx; the other sources are those of the checkout.
  for (const auto& [name, text] : headers) {
    if (!name.starts_with("kernels/ptx/")) continue;
    const fs::path path = fs::path(folder) / name;
    fs::create_directories(path.parent_path());
    std::ofstream(path) << "#pragma once\n";
  }
  std::ofstream(folder + "/kernel.cc") << "#include \"ptx.h\"\n" << source << harness_of(source);
  const std::string library = folder + ".so";
  const std::string command =
      "cd '" + folder + "' && " EMULATOR_COMPILER " kernel.cc '" EMULATOR_LIBRARY "' -o '" + library + "' > log 2>&1";
  const bool done = std::system(command.c_str()) == 0;
  std::ifstream log(folder + "/log");
  const Compiled compiled = {done ? library : "", std::string(std::istreambuf_iterator<char>(log), {})};
  fs::remove_all(folder);
  return compiled;
}

const DriverApi& driver() {
  static const DriverApi api = [] {
    DriverApi api = {};
    api.cuLibraryLoadData = [](Library* library, const void* name, int*, void**, unsigned, int*, void**, unsigned) {
      *library = static_cast<Library>(dlopen(static_cast<const char*>(name), RTLD_NOW | RTLD_LOCAL));
      return *library ? 0 : 1;
    };
    api.cuLibraryUnload = [](Library library) { return dlclose(library); };
    api.cuLibraryGetKernel = [](Kernel* kernel, Library library, const char* name) {
      *kernel = static_cast<Kernel>(dlsym(library, (std::string("emulated_") + name).c_str()));
      return *kernel ? 0 : 1;
    };
    api.cuKernelSetAttribute = [](int, int, Kernel, int) { return 0; };
    api.cuKernelGetFunction = [](Function* function, Kernel kernel) {
      *function = reinterpret_cast<Function>(kernel);
      return 0;
    };
    api.cuTensorMapEncodeTiled = [](DriverTensorMap map, int type, unsigned rank, void* data, const uint64* dims,
                                    const uint64* strides, const unsigned* box, const unsigned* element_strides,
                                    int interleave, int swizzle, int, int fill) {
      emulator::TensorBoxes boxes = {static_cast<const char*>(data)};
      bool legal = rank == 4 && interleave == kTensorMapNoInterleave && fill == kTensorMapFillZeros &&
                   reinterpret_cast<uintptr_t>(data) % 16 == 0;
      for (int i = 0; i < 4; ++i) {
        boxes.dims[i] = dims[i], boxes.box[i] = box[i];
        legal = legal && 1 <= dims[i] && dims[i] <= uint64{1} << 32 && 1 <= box[i] && box[i] <= 256 &&
                element_strides[i] == 1;
        if (i == 3) break;
        boxes.strides[i] = strides[i];
        legal = legal && 16 <= strides[i] && strides[i] % 16 == 0 && strides[i] < uint64{1} << 40;
      }
      boxes.element = type == kTensorMapF32 ? 4 : 2;
      boxes.swizzle = swizzle == kTensorMapSwizzle128 ? 128 : swizzle == kTensorMapSwizzle64 ? 64 : 0;
      const unsigned row_bytes = boxes.element * box[0];
      legal = legal && (boxes.swizzle ? row_bytes <= boxes.swizzle : row_bytes % 16 == 0);
      std::memcpy(map, &boxes, sizeof boxes);
      return legal ? 0 : 1;
    };
    return api;
  }();
  return api;
}

void check_driver(int result, const char* name) {
  if (result) throw Error(Error::Code::kInternal, std::string(name) + " failed");
}

std::vector<Arch> visible_archs() {
  return {emulated_arch};
}

Arch arch_of(int32) {
  return emulated_arch;
}

int32 multiprocessors_of(int32) {
  return 3;  // so that a thread block that stays on its multiprocessor has something to do
}

bool can_start_early(int32) {
  return false;
}

std::string name_of(const Arch& arch) {
  return "emulated_" + std::to_string(arch.sm);
}

void set_zero(void* data, int64 bytes, Stream) {
  std::memset(data, 0, size_t(bytes));
}

void launch(Function function, int64 grid_x, int32 threads, int64 shared_bytes, Stream, const void* params, bool) {
  if (grid_x == 0) return;
  std::lock_guard lock(mutex);
  blocks_of_last_launch = grid_x;
  if (const char* error = reinterpret_cast<Entry>(function)(unsigned(grid_x), threads, shared_bytes, params))
    throw Error(Error::Code::kInternal, error);
}

}  // namespace flash::cuda

namespace flash::ffi {
namespace {

// A copy of an operand (read-only) or result (poisoned) that ends where memory may not be touched. In front of it lies
// more poison, and in front of that another such page.
class GuardedBuffer {
 public:
  GuardedBuffer(const xf::AnyBuffer& buffer, bool is_result)
      : original_(buffer.untyped_data()), size_(buffer.size_bytes()), is_result_(is_result) {
    const size_t page = sysconf(_SC_PAGESIZE);
    inner_ = (size_ + page - 1) / page * page + page;
    outer_ = inner_ + 2 * page;
    memory_ = static_cast<char*>(mmap(nullptr, outer_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    begin_ = memory_ + page;
    mprotect(begin_, inner_, PROT_READ | PROT_WRITE);
    std::memset(begin_, kPoison, inner_);
    if (is_result_) return;
    std::memcpy(data(), original_, size_);
    mprotect(begin_, inner_, PROT_READ);
  }
  ~GuardedBuffer() { munmap(memory_, outer_); }
  GuardedBuffer(const GuardedBuffer&) = delete;

  const void* original() const { return original_; }
  size_t size() const { return size_; }
  char* data() const { return begin_ + inner_ - size_; }

  void finish() const {
    if (!is_result_) return;
    for (const char* p = begin_; p < data(); ++p)
      if (*p != kPoison) throw cuda::Error(cuda::Error::Code::kInternal, "writes in front of a result");
    std::memcpy(original_, data(), size_);
  }

 private:
  static constexpr char kPoison = char(0xFF);  // NaN in every format
  void* original_;
  size_t size_, inner_, outer_;
  bool is_result_;
  char *memory_, *begin_;
};

// Views have the addresses of XLA's buffers, and nothing else in a problem looks like one.
template <class Problem>
void redirect(Problem& problem, const GuardedBuffer& buffer) {
  char* bytes = reinterpret_cast<char*>(&problem);
  for (size_t at = 0; at < sizeof problem; at += sizeof(void*)) {
    void* word;
    std::memcpy(&word, bytes + at, sizeof word);
    if (word != buffer.original()) continue;
    word = buffer.data();
    std::memcpy(bytes + at, &word, sizeof word);
  }
}

template <auto decode>
xf::Error execute(Attrs attrs, xf::RemainingArgs args, xf::RemainingRets rets) {
  auto problem = decode(attrs, args, rets);
  if (problem.has_error()) return problem.error();
  try {
    std::deque<GuardedBuffer> buffers;
    for (size_t i = 0; i < args.size(); ++i) buffers.emplace_back(*args.get<xf::AnyBuffer>(i), false);
    for (size_t i = 0; i < rets.size(); ++i) buffers.emplace_back(**rets.get<xf::AnyBuffer>(i), true);
    // An empty buffer may have the address of another.
    std::map<const void*, const GuardedBuffer*> largest;
    for (const GuardedBuffer& buffer : buffers)
      if (const GuardedBuffer*& known = largest[buffer.original()]; !known || known->size() < buffer.size())
        known = &buffer;
    for (const auto& [original, buffer] : largest)
      if (original) redirect(*problem, *buffer);
    cuda::launch(*problem, 0, nullptr);
    for (const GuardedBuffer& buffer : buffers) buffer.finish();
    return xf::Error::Success();
  } catch (const std::exception& error) {
    return xf::Error(xf::ErrorCode::kInternal, std::string("emulated GPU: ") + error.what());
  }
}

auto binding() {
  return xf::Ffi::Bind().Attrs<Attrs>().RemainingArgs().RemainingRets();
}

}  // namespace
}  // namespace flash::ffi

XLA_FFI_DEFINE_HANDLER_SYMBOL(emulated_fwd, flash::ffi::execute<flash::ffi::decode_fwd>, flash::ffi::binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(emulated_bwd, flash::ffi::execute<flash::ffi::decode_bwd>, flash::ffi::binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(emulated_dbias, flash::ffi::execute<flash::ffi::decode_dbias>, flash::ffi::binding());

// Chooses the family of kernels, and whether Hopper's forward has blocks of 192 queries, however few there are.
extern "C" void emulate_choice(int family, bool large_blocks) {
  std::map<std::string, flash::int32> fields = {{"family", family}};
  if (large_blocks) fields.insert({{"direction", int(flash::Direction::kFwd)}, {"block_q", 192}, {"num_warps", 12}});
  flash::cuda::override_config(fields);
}

// Thread blocks of the kernel that ran last.
extern "C" long long emulated_blocks() {
  return flash::cuda::blocks_of_last_launch;
}

// Whether an order has each block of each head once, and if deterministic one behind the other.
static bool is_sound(const flash::UnitOrder& order, long long heads, long long blocks, bool deterministic = false) {
  if (order.count() != heads * blocks) return false;
  std::vector<bool> seen(order.count());
  for (flash::uint32 unit = 0; unit < order.count(); ++unit) {
    const auto [head, block] = order.place_of(unit);
    if (deterministic && head * blocks + block != unit) return false;
    if (head >= heads || block >= blocks || seen[head * blocks + block]) return false;
    seen[head * blocks + block] = true;
  }
  return true;
}

// Whether those of a forward and of a backward are, deterministic or not: without a mask, with a causal one, and of
// packed sequences, which have a third of the rows that they might have.
extern "C" bool has_sound_order(long long heads, long long heads_kv, long long seqlen_q, long long seqlen_kv,
                                long long sequences) {
  flash::KernelConfig config = {};
  config.block_q = config.block_kv = 128;
  enum Kind { kFull, kCausal, kPacked };
  auto fill = [&](auto p, Kind kind) {
    p.num_heads = heads, p.num_heads_kv = heads_kv, p.num_sequences = sequences;
    p.max_seqlen_q = seqlen_q, p.max_seqlen_kv = seqlen_kv, p.head_dim = p.head_dim_v = 64;
    p.seqlen_q = kind == kPacked ? seqlen_q * sequences / 3 : seqlen_q;
    p.seqlen_kv = kind == kPacked ? seqlen_kv * sequences / 3 : seqlen_kv;
    if (kind == kPacked) p.cu_seqlens_q.data = p.cu_seqlens_kv.data = &config;  // anything
    p.options.window_left = -1, p.options.window_right = kind == kFull ? -1 : 0;
    return p;
  };
  for (Kind kind : {kFull, kCausal, kPacked})
    for (bool deterministic : {false, true}) {
      config.deterministic = deterministic;
      if (!is_sound(flash::cuda::unit_order(fill(flash::FwdProblem{}, kind), config, 132), heads * sequences,
                    (seqlen_q + 127) / 128) ||
          !is_sound(flash::cuda::unit_order(fill(flash::BwdProblem{}, kind), config, 132), heads_kv * sequences,
                    (seqlen_kv + 127) / 128, deterministic))
        return false;
    }
  return true;
}

// Chooses the architecture that is emulated. The first call also settles the cache's folder.
extern "C" void emulate(int sm, long long max_shared_bytes) {
  flash::cuda::cache_directory();
  flash::cuda::emulated_arch = {sm, max_shared_bytes};
}
