// NVRTC, NVIDIA's run-time compiler: source text to machine code. libnvrtc is opened when first needed.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "cuda/driver.h"

namespace flash::cuda {

// Where to look for libnvrtc besides the places that the system knows: the folders of Python packages. Has an effect
// until NVRTC is first used.
void set_nvrtc_directories(std::vector<std::string> directories);

// "13.0"; throws Error where there is no NVRTC.
std::string nvrtc_version();

struct Compiled {
  std::string cubin;  // empty if the source has errors
  std::string log;
};

// `headers` maps the names by which files are included to their texts. Throws Error where there is no NVRTC, or one
// that does not know the architecture.
Compiled nvrtc_compile(const std::string& source, const std::map<std::string, std::string>& headers, const Arch& arch,
                       const std::vector<std::string>& options);

}  // namespace flash::cuda
