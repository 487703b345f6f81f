// The extension module jax_flash._core: the handlers as capsules, ready for jax.ffi.register_ffi_target, and the run
// time's inner steps for tests and for compiling ahead of time.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <initializer_list>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/attention.h"
#include "cuda/disk_cache.h"
#include "cuda/heuristics.h"
#include "cuda/jit.h"
#include "cuda/nvrtc.h"
#include "ffi/handlers.h"

namespace nb = nanobind;

namespace {

nb::dict stages(std::initializer_list<std::pair<const char*, XLA_FFI_Handler*>> handlers) {
  nb::dict dict;
  for (const auto& [stage, handler] : handlers) dict[stage] = nb::capsule(reinterpret_cast<void*>(handler));
  return dict;
}

nb::dict targets(const std::string& platform) {
  nb::dict dict;
  if (platform == "cpu") {
    dict["jax_flash_fwd"] = stages({{"execute", jax_flash_fwd_cpu}});
    dict["jax_flash_bwd"] = stages({{"execute", jax_flash_bwd_cpu}});
    dict["jax_flash_dbias"] = stages({{"execute", jax_flash_dbias_cpu}});
  } else if (platform == "CUDA") {
    dict["jax_flash_fwd"] = stages({{"instantiate", jax_flash_fwd_cuda_instantiate},
                                    {"initialize", jax_flash_fwd_cuda_initialize},
                                    {"execute", jax_flash_fwd_cuda_execute}});
    dict["jax_flash_bwd"] = stages({{"instantiate", jax_flash_bwd_cuda_instantiate},
                                    {"initialize", jax_flash_bwd_cuda_initialize},
                                    {"execute", jax_flash_bwd_cuda_execute}});
    dict["jax_flash_dbias"] = stages({{"instantiate", jax_flash_dbias_cuda_instantiate},
                                      {"initialize", jax_flash_dbias_cuda_initialize},
                                      {"execute", jax_flash_dbias_cuda_execute}});
  } else {
    throw std::invalid_argument("no platform " + platform);
  }
  return dict;
}

// Fields that are not named are 0.
flash::KernelConfig config_from(const nb::dict& fields) {
  flash::KernelConfig config = {};
  size_t known = 0;
  flash::for_each_field(config, [&](const char* name, auto& field) {
    if (!fields.contains(name)) return;
    field = static_cast<std::remove_reference_t<decltype(field)>>(nb::cast<int>(fields[name]));
    ++known;
  });
  if (known != fields.size()) throw std::invalid_argument("an unknown field of KernelConfig");
  return config;
}

nb::dict fields_of(const flash::KernelConfig& config) {
  nb::dict fields;
  flash::for_each_field(config, [&](const char* name, auto value) { fields[name] = static_cast<int>(value); });
  return fields;
}

nb::tuple nvrtc_compile(const std::string& source, const std::string& arch, const std::vector<std::string>& options) {
  flash::cuda::Compiled compiled;
  {
    nb::gil_scoped_release release;
    std::vector<std::string> all = flash::cuda::compile_options();
    all.insert(all.end(), options.begin(), options.end());
    compiled =
        flash::cuda::nvrtc_compile(source, flash::cuda::kernel_sources(), flash::cuda::arch_from_name(arch), all);
  }
  return nb::make_tuple(nb::bytes(compiled.cubin.data(), compiled.cubin.size()), compiled.log);
}

std::vector<std::string> visible_archs() {
  std::vector<std::string> names;
  for (const flash::cuda::Arch& arch : flash::cuda::visible_archs()) names.push_back(flash::cuda::name_of(arch));
  return names;
}

}  // namespace

NB_MODULE(_core, m) {
  m.def("targets", &targets, nb::arg("platform"),
        "Handlers of the custom calls on platform \"cpu\" or \"CUDA\": by target name, then by stage.");
  m.def("instruction_sets", &flash::cpu::instruction_sets,
        "CPU instruction sets that this processor runs; the first, the fastest, is in use.");
  m.def("use_instruction_set", &flash::cpu::use_instruction_set, nb::arg("name"),
        "Switches the CPU kernels to another of instruction_sets(), for tests.");

  m.def("set_nvrtc_directories", &flash::cuda::set_nvrtc_directories, nb::arg("directories"),
        "Where else to look for libnvrtc, before it is first used.");
  m.def("driver_version", &flash::cuda::driver_version, "Newest CUDA version that the driver serves, as in \"13.0\".");
  m.def("nvrtc_version", &flash::cuda::nvrtc_version, "Version of NVRTC, as in \"13.0\".");
  m.def("visible_archs", &visible_archs, "Architectures of this machine's GPUs, as in \"sm_90a\".");
  m.def("cache_directory", &flash::cuda::cache_directory, "Folder of compiled kernels; empty if there is none.");
  m.def(
      "configure",
      [](const nb::dict& facts, const std::string& arch) {
        return fields_of(flash::cuda::configure(config_from(facts), flash::cuda::arch_from_name(arch)));
      },
      nb::arg("facts"), nb::arg("arch"), "The KernelConfig, by field name, that serves the facts of a call.");
  m.def(
      "override_config",
      [](const nb::dict& fields) {
        fields_of(config_from(fields));  // which refuses unknown names
        std::map<std::string, flash::int32> values;
        for (const auto& [name, value] : fields) values[nb::cast<std::string>(name)] = nb::cast<int>(value);
        flash::cuda::override_config(values);
      },
      nb::arg("fields"), "For tests and measurements: fields that configure() takes in place of its choice.");
  m.def(
      "kernel_source", [](const nb::dict& config) { return flash::cuda::source_of(config_from(config)); },
      nb::arg("config"), "What is compiled for a KernelConfig.");
  m.def(
      "compile_kernel",
      [](const nb::dict& fields, const std::string& arch) {
        const flash::KernelConfig config = config_from(fields);
        nb::gil_scoped_release release;
        flash::cuda::compile(config, flash::cuda::arch_from_name(arch));
      },
      nb::arg("config"), nb::arg("arch"), "Compiles into the caches, unless it is there.");
  m.def(
      "load_kernel",
      [](const nb::dict& fields, int device) {
        const flash::KernelConfig config = config_from(fields);
        nb::gil_scoped_release release;
        flash::cuda::load(config, device);
      },
      nb::arg("config"), nb::arg("device"), "Loads on a device, whose context must be current.");
  m.def("nvrtc_compile", &nvrtc_compile, nb::arg("source"), nb::arg("arch"),
        nb::arg("options") = std::vector<std::string>(),
        "Compiles without caches: machine code, empty if the source has errors, and log.");
}
