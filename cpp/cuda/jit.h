// From a KernelConfig to functions that can be launched: source text, NVRTC, the cache on disk, the cache in memory,
// loading. Everything here may be called from any thread.
#pragma once

#include <string>
#include <vector>

#include "common/config.h"
#include "cuda/driver.h"

namespace flash::cuda {

// The translation unit that specialises the kernels for `config`.
std::string source_of(const KernelConfig& config);

// Mixes x into a hash.
inline uint64 mixed(uint64 hash, uint64 x) {
  hash = (hash ^ x) * 0x9e3779b97f4a7c15;
  return hash ^ hash >> 32;
}

// NVRTC's options for it, besides the architecture.
const std::vector<std::string>& compile_options();

// Names of its entry points, in the order in which they are launched: the backward and Hopper's forward have one in
// front of the main one. Only the main one takes dynamic shared memory, shared_bytes(config).
std::vector<std::string> entry_points(const KernelConfig& config);
inline constexpr int32 kMaxEntries = 3;
constexpr int32 main_entry(const KernelConfig& c) {
  return c.direction == Direction::kBwd || (c.direction == Direction::kFwd && c.family == Family::kSm90) ? 1 : 0;
}

// The entry points of one config, loaded on one device.
struct Kernels {
  Function entry[kMaxEntries];
};

// Compiles for an architecture unless it is in a cache. Throws Error.
void compile(const KernelConfig& config, const Arch& arch);

// The kernels on a device, whose context must be current: a hash lookup when they are there, else loaded, and compiled
// if need be. Throws Error.
const Kernels& load(const KernelConfig& config, int32 device);

}  // namespace flash::cuda
