// Holds the declarations of cpp/cuda/api.h to NVIDIA's headers. Compiled, never run: see test_abi.py.
#include "common/problem.h"
#include "cuda/api.h"

#include <cuda.h>
#include <nvrtc.h>

#include <cstddef>
#include <type_traits>

// Whether a caller cannot tell two types apart: handles are pointers to whatever, enums are int.
template <class A, class B>
constexpr bool alike() {
  if constexpr (std::is_pointer_v<A> && std::is_pointer_v<B>) {
    using To = std::remove_cv_t<std::remove_pointer_t<A>>;
    using From = std::remove_cv_t<std::remove_pointer_t<B>>;
    if constexpr (std::is_scalar_v<To> || std::is_scalar_v<From>) return alike<To, From>();
    return true;
  } else {
    constexpr bool integers =
        (std::is_integral_v<A> || std::is_enum_v<A>) && (std::is_integral_v<B> || std::is_enum_v<B>);
    return integers && sizeof(A) == sizeof(B);
  }
}

template <class F, class G>
struct Compare;
template <class R, class... A, class S, class... B>
struct Compare<R (*)(A...), S (*)(B...)> {
  static_assert(sizeof...(A) == sizeof...(B));
  static constexpr bool value = alike<R, S>() && (alike<A, B>() && ...);
};

#define CHECK(api, name) \
  static_assert(Compare<decltype(&::name), decltype(flash::cuda::api::name)>::value, "signature of " #name);
#define CHECK_DRIVER(result, name, ...) CHECK(DriverApi, name)
#define CHECK_NVRTC(result, name, ...) CHECK(NvrtcApi, name)
FLASH_DRIVER_FUNCTIONS(CHECK_DRIVER)
FLASH_NVRTC_FUNCTIONS(CHECK_NVRTC)

#define SAME(ours, theirs) static_assert(int(flash::cuda::ours) == int(theirs), #ours)
SAME(kComputeCapabilityMajor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
SAME(kComputeCapabilityMinor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
SAME(kMultiprocessorCount, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
SAME(kMaxDynamicSharedSizeBytes, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
SAME(kErrorCompilation, NVRTC_ERROR_COMPILATION);
SAME(kTensorMapBf16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16);
SAME(kTensorMapF16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16);
SAME(kTensorMapF32, CU_TENSOR_MAP_DATA_TYPE_FLOAT32);
SAME(kTensorMapNoInterleave, CU_TENSOR_MAP_INTERLEAVE_NONE);
SAME(kTensorMapNoSwizzle, CU_TENSOR_MAP_SWIZZLE_NONE);
SAME(kTensorMapSwizzle64, CU_TENSOR_MAP_SWIZZLE_64B);
SAME(kTensorMapSwizzle128, CU_TENSOR_MAP_SWIZZLE_128B);
SAME(kTensorMapPromoteL2To256, CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
SAME(kTensorMapFillZeros, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
SAME(kEarlyStart, CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);

#define SAME_STRUCT(ours, theirs) static_assert(sizeof(flash::cuda::ours) == sizeof(theirs), #ours)
#define SAME_PLACE(ours, field, theirs, their_field) \
  static_assert(offsetof(flash::cuda::ours, field) == offsetof(theirs, their_field), #ours "::" #field)
SAME_STRUCT(LaunchAttribute, CUlaunchAttribute);
SAME_PLACE(LaunchAttribute, id, CUlaunchAttribute, id);
SAME_PLACE(LaunchAttribute, value, CUlaunchAttribute, value.programmaticStreamSerializationAllowed);
SAME_STRUCT(LaunchConfig, CUlaunchConfig);
SAME_PLACE(LaunchConfig, grid_x, CUlaunchConfig, gridDimX);
SAME_PLACE(LaunchConfig, block_x, CUlaunchConfig, blockDimX);
SAME_PLACE(LaunchConfig, block_z, CUlaunchConfig, blockDimZ);
SAME_PLACE(LaunchConfig, shared_bytes, CUlaunchConfig, sharedMemBytes);
SAME_PLACE(LaunchConfig, stream, CUlaunchConfig, hStream);
SAME_PLACE(LaunchConfig, attributes, CUlaunchConfig, attrs);
SAME_PLACE(LaunchConfig, num_attributes, CUlaunchConfig, numAttrs);
static_assert(sizeof(flash::TensorMap) == sizeof(CUtensorMap) && alignof(flash::TensorMap) >= alignof(CUtensorMap));
static_assert(sizeof(flash::cuda::DevicePointer) == sizeof(CUdeviceptr));
