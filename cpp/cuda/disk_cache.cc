#include "cuda/disk_cache.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>

#include "cuda/driver.h"

namespace flash::cuda {
namespace {

namespace fs = std::filesystem;

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

std::optional<std::string> read_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return std::nullopt;
  std::string text{std::istreambuf_iterator<char>(file), {}};
  if (file.bad()) return std::nullopt;
  return text;
}

bool write_file(const fs::path& path, std::string_view header, std::string_view text) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << header << text;
  file.close();
  return bool(file);
}

fs::path path_of(const std::string& key) {
  return fs::path(cache_directory()) / (key + ".cubin");
}

// In front of an entry's bytes: what it is, whose it is, and whether it is whole.
std::string header_of(const std::string& key, std::string_view bytes) {
  Hash hash;
  hash.add(bytes);
  return "jax_flash cubin 1\n" + key + "\n" + hash.hex() + "\n";
}

// Distinct also among processes on several hosts that share the folder.
std::string random_name() {
  std::random_device random;
  Hash hash;
  for (int i = 0; i < 4; ++i) hash.add(std::to_string(random()));
  return hash.hex();
}

}  // namespace

void Hash::add(std::string_view text) {
  auto step = [this](uint64 x) {
    a_ = (a_ ^ x) * 0x100000001b3;
    b_ = (b_ + x) * 0xd6e8feb86659fd93;
    b_ ^= b_ >> 32;
  };
  step(text.size());
  for (const char c : text) step(uint8(c));
}

std::string Hash::hex() const {
  char text[33];
  std::snprintf(text, sizeof text, "%016llx%016llx", a_ ^ (a_ >> 29), b_);
  return text;
}

const std::map<std::string, std::string>& kernel_sources() {
  static const std::map<std::string, std::string> sources = [] {
    Dl_info info;
    fs::path root;
    if (dladdr(reinterpret_cast<void*>(&kernel_sources), &info) && info.dli_fname)
      root = fs::path(info.dli_fname).parent_path() / "cuda";
    std::map<std::string, std::string> found;
    for (const char* folder : {"common", "kernels"}) {
      std::error_code missing;
      for (auto it = fs::recursive_directory_iterator(root / folder, missing); it != fs::recursive_directory_iterator();
           it.increment(missing)) {
        const std::string extension = it->path().extension().string();
        if (extension != ".h" && extension != ".cuh") continue;
        if (auto text = read_file(it->path())) found[it->path().lexically_relative(root).generic_string()] = *text;
      }
    }
    if (!found.contains("kernels/sm80/fwd.cuh"))
      throw Error(Error::Code::kInternal, "the kernel sources are not in " + root.string() + ": reinstall jax_flash");
    return found;
  }();
  return sources;
}

const std::string& cache_directory() {
  static const std::string directory = [] {
    if (const std::string chosen = environment("JAX_FLASH_CACHE_DIR"); !chosen.empty()) return chosen;
    if (const std::string xdg = environment("XDG_CACHE_HOME"); !xdg.empty()) return xdg + "/jax_flash";
    if (const std::string home = environment("HOME"); !home.empty()) return home + "/.cache/jax_flash";
    return std::string();
  }();
  return directory;
}

std::optional<std::string> read_cache(const std::string& key) {
  if (cache_directory().empty()) return std::nullopt;
  std::optional<std::string> entry = read_file(path_of(key));
  if (!entry) return std::nullopt;
  const size_t header_size = header_of(key, "").size();
  if (entry->size() > header_size) {
    const std::string_view bytes = std::string_view(*entry).substr(header_size);
    if (entry->starts_with(header_of(key, bytes))) return std::string(bytes);
  }
  log("replaces the damaged " + path_of(key).string());
  return std::nullopt;
}

void write_cache(const std::string& key, const std::string& bytes) {
  if (cache_directory().empty()) return;
  std::error_code error;
  fs::create_directories(cache_directory(), error);
  const fs::path temporary = fs::path(cache_directory()) / (key + "." + random_name() + ".tmp");
  bool done = write_file(temporary, header_of(key, bytes), bytes);
  if (done) {
    fs::rename(temporary, path_of(key), error);
    done = !error;
  }
  if (done) return;
  fs::remove(temporary, error);
  log("cannot write to " + cache_directory() + ": compiled kernels are kept in memory only");
}

bool verbose() {
  static const bool verbose = [] {
    const std::string value = environment("JAX_FLASH_VERBOSE");
    return !value.empty() && value != "0";
  }();
  return verbose;
}

void log(const std::string& line) {
  if (verbose()) std::fprintf(stderr, "jax_flash: %s\n", line.c_str());
}

void dump(const std::string& name, const std::string& text) {
  static const std::string directory = environment("JAX_FLASH_DUMP_DIR");
  if (directory.empty()) return;
  std::error_code error;
  fs::create_directories(directory, error);
  if (!write_file(fs::path(directory) / name, "", text)) log("cannot write to " + directory);
}

}  // namespace flash::cuda
