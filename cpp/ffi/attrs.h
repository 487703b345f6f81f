// The attributes of the custom calls: the mirror of jax_flash/_attrs.py, field by field (tests/test_attrs.py).
#pragma once

#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace flash::ffi {

struct Attrs {
  int32_t operands;  // bit i: Operand i is passed
  float scale;
  float logits_soft_cap;  // 0: none
  int32_t window_left;    // -1: unbounded
  int32_t window_right;
  bool bottom_right;
  int32_t keep_threshold;  // dropout keeps a byte below it; 256: no dropout
  bool deterministic;
  bool return_softmax;
  int32_t max_seqlen_q;  // 0: not packed
  int32_t max_seqlen_kv;
  int32_t num_splits;  // 0: chosen by the implementation
};

// The operands of all calls in the order in which they are passed: OPERANDS of _attrs.py.
enum class Operand : int32_t {
  kQuery,
  kKey,
  kValue,
  kBias,
  kMask,
  kAlibiSlopes,
  kSinks,
  kQuerySeqLengths,
  kKeyValueSeqLengths,
  kQuerySegmentIds,
  kKeyValueSegmentIds,
  kCuSeqlensQ,
  kCuSeqlensKv,
  kPageTable,
  kDropoutStream,
  kOut,
  kLse,
  kDOut,
  kDLse,
  kDelta,
  kCount
};

}  // namespace flash::ffi

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    flash::ffi::Attrs, ::xla::ffi::StructMember<int32_t>("operands"), ::xla::ffi::StructMember<float>("scale"),
    ::xla::ffi::StructMember<float>("logits_soft_cap"), ::xla::ffi::StructMember<int32_t>("window_left"),
    ::xla::ffi::StructMember<int32_t>("window_right"), ::xla::ffi::StructMember<bool>("bottom_right"),
    ::xla::ffi::StructMember<int32_t>("keep_threshold"), ::xla::ffi::StructMember<bool>("deterministic"),
    ::xla::ffi::StructMember<bool>("return_softmax"), ::xla::ffi::StructMember<int32_t>("max_seqlen_q"),
    ::xla::ffi::StructMember<int32_t>("max_seqlen_kv"), ::xla::ffi::StructMember<int32_t>("num_splits"));
