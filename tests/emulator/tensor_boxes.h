// What the emulated driver (runtime.cc) writes into a tensor map and the emulated copy engine (ptx.h) reads.
#pragma once

namespace emulator {

// A tensor of 16-bit elements, innermost axis first, and the boxes in which it is copied. Strides, from the second axis
// on, and the swizzle's span are in bytes.
struct TensorBoxes {
  const char* data;
  unsigned long long dims[4], strides[3];
  unsigned box[4], swizzle;
};

}  // namespace emulator
