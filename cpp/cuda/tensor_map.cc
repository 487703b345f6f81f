#include "cuda/tensor_map.h"

#include "cuda/driver.h"

namespace flash::cuda {

TensorMap tensor_map_of(const View& view, int64 batch, int64 rows, int64 heads, int64 cols, int32 box_cols,
                        int32 box_rows) {
  const int64 element = view.dtype == DType::kF32 ? 4 : 2;
  // An axis without elements, or one that all share, has one place: the kernel asks for no other.
  auto size = [](int64 n) { return uint64(max_of<int64>(n, 1)); };
  auto bytes = [&](int64 stride) { return uint64(max_of<int64>(element * stride, 16)); };
  const uint64 dims[4] = {size(cols), size(rows), view.head_stride ? size(heads) : 1,
                          view.batch_stride[0] ? size(batch) : 1};
  const uint64 strides[3] = {bytes(view.row_stride), bytes(view.head_stride), bytes(view.batch_stride[0])};
  const unsigned box[4] = {unsigned(box_cols), unsigned(box_rows), 1, 1};
  const unsigned element_strides[4] = {1, 1, 1, 1};
  const int type = view.dtype == DType::kF32    ? kTensorMapF32
                   : view.dtype == DType::kBF16 ? kTensorMapBf16
                                                : kTensorMapF16;
  const int swizzle = view.dtype == DType::kF32 ? kTensorMapNoSwizzle
                      : box_cols == 64          ? kTensorMapSwizzle128
                                                : kTensorMapSwizzle64;
  TensorMap map;
  check_driver(driver().cuTensorMapEncodeTiled(reinterpret_cast<DriverTensorMap>(&map), type, 4, view.data, dims,
                                               strides, box, element_strides, kTensorMapNoInterleave, swizzle,
                                               kTensorMapPromoteL2To256, kTensorMapFillZeros),
               "cuTensorMapEncodeTiled");
  return map;
}

}  // namespace flash::cuda
