// The CUDA driver: which GPUs there are, and work for them. libcuda is opened when first needed, so that everything
// here may be linked and called on machines without one; what needs it then throws Error.
#pragma once

#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/types.h"
#include "cuda/api.h"

namespace flash::cuda {

// A failure, as a sentence for the user.
class Error : public std::runtime_error {
 public:
  enum class Code { kUnimplemented, kFailedPrecondition, kInternal };
  Error(Code code, const std::string& sentence) : std::runtime_error(sentence), code_(code) {}
  Code code() const { return code_; }

 private:
  Code code_;
};

// What kernels are compiled for.
struct Arch {
  int32 sm;                // 90 is compute capability 9.0
  int64 max_shared_bytes;  // dynamic shared memory that a thread block may ask for

  bool operator==(const Arch&) const = default;
};

// "sm_80", "sm_90a", ...: the suffix is optional. Throws Error for what is no architecture, or too old a one.
Arch arch_from_name(const std::string& name);

// The name by which NVRTC knows it. From 9.0 on with the suffix `a`: all instructions of just this architecture.
std::string name_of(const Arch& arch);

// Distinct architectures of this machine's GPUs; none where there is no driver or no GPU, as when compiling ahead of
// time. Throws Error if all GPUs are too old.
std::vector<Arch> visible_archs();

Arch arch_of(int32 device);
int32 multiprocessors_of(int32 device);

// "13.0"; throws Error where there is no driver.
std::string driver_version();

// The functions of libcuda. Throws Error where there is none.
const DriverApi& driver();

// Throws Error, with the driver's own words, if `result` of driver function `name` is one.
void check_driver(int result, const char* name);

// Throws Error if there are more thread blocks, or units of their work, than 31 bits can count.
inline void check_count(int64 blocks) {
  if (blocks > std::numeric_limits<int32>::max())
    throw Error(Error::Code::kUnimplemented,
                "the problem is too large: it takes " + std::to_string(blocks) + " thread blocks");
}

// Whether a kernel on the device can start before the one in front of it has ended, also where both are captured.
bool can_start_early(int32 device);

// Enqueues a kernel whose one parameter is the struct at `params`, which is read before the call returns. starts_early:
// it may do so, as it waits by itself (kernels/ptx/grid.cuh).
void launch(Function function, int64 grid_x, int32 threads, int64 shared_bytes, Stream stream, const void* params,
            bool starts_early = false);

void set_zero(void* data, int64 bytes, Stream stream);

}  // namespace flash::cuda
