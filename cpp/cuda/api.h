// The functions of libcuda and libnvrtc that are used, declared by hand: no CUDA header is needed to build, and no CUDA
// library to start. tests/test_abi.py holds the declarations to NVIDIA's headers.
#pragma once

#include <cstddef>

#include "common/types.h"

namespace flash::cuda {

using Stream = struct StreamTag*;
using Function = struct FunctionTag*;
using Library = struct LibraryTag*;
using Kernel = struct KernelTag*;
using Program = struct ProgramTag*;
using DevicePointer = unsigned long long;
using DriverTensorMap = struct DriverTensorMapTag*;  // to 128 bytes

// CUlaunchAttribute, of whose values only int are used, and CUlaunchConfig.
struct LaunchAttribute {
  int id;
  char padding[4];
  int value;
  char more[60];
};
struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  Stream stream;
  const LaunchAttribute* attributes;
  unsigned num_attributes;
};

inline constexpr int kErrorCompilation = 6;           // NVRTC_ERROR_COMPILATION
inline constexpr int kComputeCapabilityMajor = 75;    // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
inline constexpr int kComputeCapabilityMinor = 76;    // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
inline constexpr int kMultiprocessorCount = 16;       // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
inline constexpr int kMaxDynamicSharedSizeBytes = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
inline constexpr int kEarlyStart = 6;                 // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
inline constexpr int kTensorMapBf16 = 9;              // CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
inline constexpr int kTensorMapF16 = 6;               // CU_TENSOR_MAP_DATA_TYPE_FLOAT16
inline constexpr int kTensorMapF32 = 7;               // CU_TENSOR_MAP_DATA_TYPE_FLOAT32
inline constexpr int kTensorMapNoInterleave = 0;      // CU_TENSOR_MAP_INTERLEAVE_NONE
inline constexpr int kTensorMapNoSwizzle = 0;         // CU_TENSOR_MAP_SWIZZLE_NONE
inline constexpr int kTensorMapSwizzle64 = 2;         // CU_TENSOR_MAP_SWIZZLE_64B
inline constexpr int kTensorMapSwizzle128 = 3;        // CU_TENSOR_MAP_SWIZZLE_128B
inline constexpr int kTensorMapPromoteL2To256 = 3;    // CU_TENSOR_MAP_L2_PROMOTION_L2_256B
inline constexpr int kTensorMapFillZeros = 0;         // CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE

// X(result, name, parameters...). Results are CUresult and nvrtcResult, devices are ordinals, enums are int.
#define FLASH_DRIVER_FUNCTIONS(X)                                                                                   \
  X(int, cuInit, unsigned flags)                                                                                    \
  X(int, cuDriverGetVersion, int* version)                                                                          \
  X(int, cuGetErrorName, int error, const char** name)                                                              \
  X(int, cuGetErrorString, int error, const char** text)                                                            \
  X(int, cuDeviceGetCount, int* count)                                                                              \
  X(int, cuDeviceGet, int* device, int ordinal)                                                                     \
  X(int, cuDeviceGetAttribute, int* value, int attribute, int device)                                               \
  X(int, cuLibraryLoadData, Library* library, const void* code, int* jit_options, void** jit_values,                \
    unsigned num_jit_options, int* library_options, void** library_values, unsigned num_library_options)            \
  X(int, cuLibraryUnload, Library library)                                                                          \
  X(int, cuLibraryGetKernel, Kernel* kernel, Library library, const char* name)                                     \
  X(int, cuKernelSetAttribute, int attribute, int value, Kernel kernel, int device)                                 \
  X(int, cuKernelGetFunction, Function* function, Kernel kernel)                                                    \
  X(int, cuLaunchKernelEx, const LaunchConfig* config, Function function, void** params, void** extra)              \
  X(int, cuMemsetD8Async, DevicePointer data, unsigned char value, size_t bytes, Stream stream)                     \
  X(int, cuTensorMapEncodeTiled, DriverTensorMap map, int data_type, unsigned rank, void* data, const uint64* dims, \
    const uint64* strides, const unsigned* box, const unsigned* element_strides, int interleave, int swizzle,       \
    int l2_promotion, int fill)

#define FLASH_NVRTC_FUNCTIONS(X)                                                                      \
  X(int, nvrtcVersion, int* major, int* minor)                                                        \
  X(int, nvrtcGetNumSupportedArchs, int* count)                                                       \
  X(int, nvrtcGetSupportedArchs, int* archs)                                                          \
  X(int, nvrtcCreateProgram, Program* program, const char* source, const char* name, int num_headers, \
    const char* const* headers, const char* const* include_names)                                     \
  X(int, nvrtcCompileProgram, Program program, int num_options, const char* const* options)           \
  X(int, nvrtcGetCUBINSize, Program program, size_t* size)                                            \
  X(int, nvrtcGetCUBIN, Program program, char* cubin)                                                 \
  X(int, nvrtcGetProgramLogSize, Program program, size_t* size)                                       \
  X(int, nvrtcGetProgramLog, Program program, char* log)                                              \
  X(int, nvrtcDestroyProgram, Program* program)                                                       \
  X(const char*, nvrtcGetErrorString, int error)

#define FLASH_POINTER(result, name, ...) result (*name)(__VA_ARGS__);
struct DriverApi {
  FLASH_DRIVER_FUNCTIONS(FLASH_POINTER)
};
struct NvrtcApi {
  FLASH_NVRTC_FUNCTIONS(FLASH_POINTER)
};
#undef FLASH_POINTER

}  // namespace flash::cuda
