// The extension module jax_flash._core: the handlers as capsules, ready for jax.ffi.register_ffi_target.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "cpu/attention.h"
#include "ffi/handlers.h"

namespace nb = nanobind;

NB_MODULE(_core, m) {
  m.def(
      "targets",
      [] {
        nb::dict targets;
        targets["jax_flash_fwd"] = nb::capsule(reinterpret_cast<void*>(jax_flash_fwd_cpu));
        targets["jax_flash_bwd"] = nb::capsule(reinterpret_cast<void*>(jax_flash_bwd_cpu));
        return targets;
      },
      "Handlers of the custom calls on platform \"cpu\", by target name.");
  m.def("instruction_sets", &flash::cpu::instruction_sets,
        "CPU instruction sets that this processor runs; the first, the fastest, is in use.");
  m.def("use_instruction_set", &flash::cpu::use_instruction_set, nb::arg("name"),
        "Switches the CPU kernels to another of instruction_sets(), for tests.");
}
