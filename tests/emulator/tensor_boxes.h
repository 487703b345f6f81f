// What the emulated driver (runtime.cc) writes into a tensor map and the emulated copy engine (ptx.h) reads.
#pragma once

namespace emulator {

// A tensor, innermost axis first, and the boxes in which it is copied. Elements, strides, from the second axis on, and
// the swizzle's span, 0 if there is none, are in bytes.
struct TensorBoxes {
  const char* data;
  unsigned long long dims[4], strides[3];
  unsigned element, box[4], swizzle;
};

}  // namespace emulator
