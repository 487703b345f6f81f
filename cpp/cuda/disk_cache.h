// The files of the run time: kernel sources, the cache of compiled kernels, dumps. Nothing else touches the disk.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>

#include "common/types.h"

namespace flash::cuda {

// 128 bits that tell texts apart; not proof against forgery.
class Hash {
 public:
  void add(std::string_view text);
  std::string hex() const;

 private:
  uint64 a_ = 0xcbf29ce484222325, b_ = 0x9e3779b97f4a7c15;
};

// The kernel sources, by the names under which they include each other. They are installed beside the extension and
// read once, so that what is compiled is what the key of the cache says. Throws Error where they are missing.
const std::map<std::string, std::string>& kernel_sources();

// The folder of the cache: $JAX_FLASH_CACHE_DIR, or jax_flash in the user's cache folder; empty if neither is known.
const std::string& cache_directory();

// What was stored under `key`, if it is there and whole.
std::optional<std::string> read_cache(const std::string& key);

// Stores, if the folder can be written: a cache that cannot be is no error. Other processes may do the same.
void write_cache(const std::string& key, const std::string& bytes);

// True with $JAX_FLASH_VERBOSE: log() then prints to stderr.
bool verbose();
void log(const std::string& line);

// Writes a file into $JAX_FLASH_DUMP_DIR, if that is set.
void dump(const std::string& name, const std::string& text);

}  // namespace flash::cuda
