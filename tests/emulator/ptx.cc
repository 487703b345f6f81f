#include "ptx.h"

#include <array>

namespace flash::ptx {

void cp_async(uint32 shared, const void* global, int32 bytes, int32 source_bytes) {
  emulator::Fiber& thread = *emulator::current;
  char* target = emulator::shared_at(shared, bytes);
  if (source_bytes && reinterpret_cast<uint64>(global) % bytes)
    emulator::fail("cp.async from %p is not aligned", global);
  memset(target, emulator::kPoison, bytes);
  for (int32 i = 0; i < bytes; i += 4) emulator::here->in_flight[(target - emulator::here->shared + i) / 4] = true;
  thread.copies.push_back({thread.open_group, target, global, bytes, source_bytes});
}

template <bool kTrans>
static void load_matrices(uint32 (&r)[4], uint32 address) {
  struct Args {
    uint32* r;
    uint32 address;
  } args = {r, address};
  emulator::meet(args, [](Args* const* lanes) {
    for (int32 matrix = 0; matrix < 4; ++matrix) {
      uint16 x[8][8];
      for (int32 row = 0; row < 8; ++row) memcpy(x[row], emulator::shared_at(lanes[8 * matrix + row]->address, 16), 16);
      for (int32 lane = 0; lane < 32; ++lane) {
        const int32 i = lane / 4, j = lane % 4 * 2;
        lanes[lane]->r[matrix] = kTrans ? x[j][i] | uint32(x[j + 1][i]) << 16 : x[i][j] | uint32(x[i][j + 1]) << 16;
      }
    }
  });
}

void ldmatrix_x4(uint32 (&r)[4], uint32 address) {
  load_matrices<false>(r, address);
}

void ldmatrix_x4_trans(uint32 (&r)[4], uint32 address) {
  load_matrices<true>(r, address);
}

void stmatrix_x4(uint32 address, const uint32 (&r)[4]) {
  struct Args {
    const uint32* r;
    uint32 address;
  } args = {r, address};
  emulator::meet(args, [](Args* const* lanes) {
    for (int32 matrix = 0; matrix < 4; ++matrix)
      for (int32 lane = 0; lane < 32; ++lane)
        memcpy(emulator::shared_at(lanes[8 * matrix + lane / 4]->address, 16) + lane % 4 * 4, &lanes[lane]->r[matrix],
               4);
  });
  emulator::wrote_shared(address, 16);
}

void st_shared(uint32 address, uint32 value) {
  memcpy(emulator::shared_at(address, 4), &value, 4);
  emulator::wrote_shared(address, 4);
}

void st_shared_x4(uint32 address, uint32 x, uint32 y, uint32 z, uint32 w) {
  const uint32 words[4] = {x, y, z, w};
  memcpy(emulator::shared_at(address, 16), words, 16);
  emulator::wrote_shared(address, 16);
}

template <DType kDType>
void mma_of_warp(MmaArgs* const* lanes) {
  float a[16][16], b[16][8], c[16][8] = {};
  for (int32 lane = 0; lane < 32; ++lane)
    for (int32 e = 0; e < 2; ++e) {
      const int32 group = lane / 4, pair = lane % 4 * 2 + e;
      for (int32 i = 0; i < 4; ++i)
        a[group + i % 2 * 8][pair + i / 2 * 8] = unpack<kDType>(uint16(lanes[lane]->a[i] >> (16 * e)));
      for (int32 i = 0; i < 2; ++i) b[pair + i * 8][group] = unpack<kDType>(uint16(lanes[lane]->b[i] >> (16 * e)));
    }
  for (int32 m = 0; m < 16; ++m)
    for (int32 k = 0; k < 16; ++k)
      for (int32 n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
  for (int32 lane = 0; lane < 32; ++lane)
    for (int32 i = 0; i < 4; ++i) lanes[lane]->c[i] += c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}
template void mma_of_warp<DType::kBF16>(MmaArgs* const*);
template void mma_of_warp<DType::kF16>(MmaArgs* const*);

void mbarrier_init(uint32 barrier, uint32 arrivals) {
  emulator::shared_at(barrier, 8);
  emulator::here->mbarriers[barrier] = {arrivals, arrivals};
}

static void arrive_at(emulator::Mbarrier& b) {
  if (b.pending == 0) emulator::fail("arrives at an mbarrier once too often");
  --b.pending;
  emulator::end_phase_if_complete(b);
}

void mbarrier_arrive(uint32 barrier) {
  arrive_at(emulator::mbarrier_at(barrier));
}

void mbarrier_arrive_expect_tx(uint32 barrier, uint32 bytes) {
  emulator::mbarrier_at(barrier).bytes += bytes;
  mbarrier_arrive(barrier);
}

void mbarrier_wait(uint32 barrier, uint32 parity) {
  emulator::mbarrier_at(barrier);
  emulator::Fiber& thread = *emulator::current;
  thread.barrier = barrier, thread.parity = parity;
  if (!emulator::may_pass(thread)) emulator::suspend(emulator::State::kAtMbarrier);
}

static uint32 swizzled(uint32 address, uint32 span) {
  return span ? address ^ (address >> 7 & (span / 16 - 1)) << 4 : address;
}

// From now on until it has arrived, what is copied is poison.
static void begin_copy(uint32 shared, uint32 bytes, emulator::ThreadBlock& block = *emulator::here) {
  for (uint32 i = 0; i < bytes; i += 4) {
    memset(emulator::shared_at(shared + i, 4, block), emulator::kPoison, 4);
    block.in_flight[(emulator::offset_of(shared, block) + i) / 4] = true;
  }
}

static void start_transfer(std::function<void()> run) {
  emulator::copy_engine.push_back({emulator::current, std::move(run)});
}

// Of memory as it lies there.
static void write_copy(uint32 shared, const void* source, uint32 bytes, emulator::ThreadBlock& block) {
  const uint32 target = emulator::offset_of(shared, block);
  memcpy(block.shared + target, source, bytes);
  for (uint32 i = 0; i < bytes; i += 4) block.in_flight[(target + i) / 4] = false;
}

static void end_copy(uint32 bytes, uint32 barrier, emulator::ThreadBlock& block = *emulator::here) {
  emulator::Mbarrier& b = emulator::mbarrier_at(barrier, block);
  b.bytes -= bytes;
  emulator::end_phase_if_complete(b);
}

void tma_load(uint32 shared, const TensorMap& map, uint32 barrier, int32 c0, int32 c1, int32 c2, int32 c3) {
  const emulator::TensorBoxes boxes = reinterpret_cast<const emulator::TensorBoxes&>(map);
  const int32 start[4] = {c0, c1, c2, c3};
  const uint32 element = boxes.element, row_bytes = element * boxes.box[0], bytes = row_bytes * boxes.box[1];
  if (shared % 128) emulator::fail("the copy engine writes to byte %u, which is not aligned", shared);
  if (boxes.box[2] != 1 || boxes.box[3] != 1 || (boxes.swizzle && row_bytes != boxes.swizzle))
    emulator::fail("an unexpected tensor map");
  begin_copy(shared, bytes);
  start_transfer([=] {  // by value: the kernel may end before it
    for (uint32 r = 0; r < boxes.box[1]; ++r)
      for (uint32 c = 0; c < boxes.box[0]; ++c) {
        const int64 at[4] = {start[0] + c, start[1] + r, start[2], start[3]};
        int64 offset = element * at[0];
        bool inside = true;
        for (int32 d = 0; d < 4; ++d) {
          inside = inside && at[d] >= 0 && uint64(at[d]) < boxes.dims[d];
          if (d > 0) offset += at[d] * int64(boxes.strides[d - 1]);
        }
        const uint32 target = emulator::offset_of(swizzled(shared + r * row_bytes + element * c, boxes.swizzle));
        uint32 x = 0;
        if (inside) memcpy(&x, boxes.data + offset, element);
        memcpy(emulator::here->shared + target, &x, element);
        emulator::here->in_flight[target / 4] = false;
      }
    end_copy(bytes, barrier);
  });
}

void fence_proxy_async() {
  emulator::Fiber& thread = *emulator::current;
  for (const unsigned word : thread.unfenced)
    if (emulator::here->unfenced[word] == thread.index.x + 1) emulator::here->unfenced[word] = 0;
  thread.unfenced.clear();
}

uint32 peer_shared(uint32 address, uint32 rank) {
  if (emulator::offset_of(address) >= emulator::shared_bytes)
    emulator::fail("%#x is no address in a block's own shared memory", address);
  if (rank >= emulator::cluster.size()) emulator::fail("the cluster has no block %u", rank);
  return address - emulator::first_address(*emulator::here) + emulator::first_address(emulator::cluster[rank]);
}

// The block at whose shared memory the address is.
static emulator::ThreadBlock& peer_at(uint32 peer_address) {
  const uint32 rank = peer_address >> emulator::kRankShift;
  if (rank >= emulator::cluster.size()) emulator::fail("%#x is no address in a cluster", peer_address);
  if (!emulator::all_have_started)
    emulator::fail("touches the shared memory of a thread block that may not have started");
  emulator::check_running(emulator::cluster[rank]);
  return emulator::cluster[rank];
}

void mbarrier_arrive_peer(uint32 peer_barrier) {
  arrive_at(emulator::mbarrier_at(peer_barrier, peer_at(peer_barrier)));
}

// Has the copy engine write to another block what `read` returns then.
template <class Read>
static void send(uint32 peer_address, uint32 bytes, uint32 peer_barrier, Read read) {
  emulator::ThreadBlock& peer = peer_at(peer_address);
  if (&peer != &peer_at(peer_barrier)) emulator::fail("sends to one block and tells another");
  if (peer_address % 16 || bytes % 16)
    emulator::fail("sends %u bytes to byte %u, which is not aligned", bytes, peer_address);
  emulator::mbarrier_at(peer_barrier, peer);
  begin_copy(peer_address, bytes, peer);
  start_transfer([=, &peer] {
    emulator::check_running(peer);
    write_copy(peer_address, read(), bytes, peer);
    end_copy(bytes, peer_barrier, peer);
  });
}

void st_async_x4(uint32 peer_address, uint32 x, uint32 y, uint32 z, uint32 w, uint32 peer_barrier) {
  const std::array<uint32, 4> words = {x, y, z, w};
  send(peer_address, 16, peer_barrier, [=] { return words.data(); });
}

void copy_to_peer(uint32 peer_address, uint32 source, uint32 bytes, uint32 peer_barrier) {
  const auto read = [=] {
    emulator::check_running(*emulator::here);
    for (uint32 i = 0; i < bytes; i += 16) emulator::shared_at_by_proxy(source + i, 16);
    return emulator::here->shared + emulator::offset_of(source);
  };
  read();  // what lies there now may be read as well as what does when the copy takes place
  send(peer_address, bytes, peer_barrier, read);
}

void barrier_arrive(int32 id, int32 threads) {
  emulator::NamedBarrier& barrier = emulator::here->named_barriers[id];
  if (++barrier.arrived < unsigned(threads)) return;
  barrier.arrived = 0;
  for (emulator::Fiber& fiber : emulator::here->fibers)
    if (fiber.state == emulator::State::kAtNamedBarrier && fiber.barrier == unsigned(id))
      fiber.state = emulator::State::kReady;
}

void barrier_sync(int32 id, int32 threads) {
  emulator::Fiber& thread = *emulator::current;
  thread.barrier = id;
  thread.state = emulator::State::kAtNamedBarrier;
  barrier_arrive(id, threads);
  if (thread.state == emulator::State::kAtNamedBarrier) emulator::suspend(thread.state);
}

// Eight elements of an operand that lie side by side: (i, k), (i, k + 1), ..., or if transposed (i, k), (i + 1, k),
// ...; i runs along m or n.
template <DType kDType>
static std::array<float, 8> operand_chunk(uint64 descriptor, bool transposed, int32 i, int32 k) {
  const uint32 start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4,
               stride = (descriptor >> 32 & 0x3FFF) << 4, span = 256 >> (descriptor >> 62);
  if (descriptor >> 62 == 0) emulator::fail("an operand without swizzle");
  const int32 columns = span / 2;
  const uint32 offset = transposed ? i / columns * leading + i % columns * 2 + k / 8 * stride + k % 8 * span
                                   : i / 8 * stride + i % 8 * span + 2 * k;
  uint16 x[8];
  const uint32 address = emulator::first_address(*emulator::here) - emulator::kSharedBase + start + offset;
  memcpy(x, emulator::shared_at_by_proxy(swizzled(address, span), 16), 16);
  std::array<float, 8> result;
  for (int32 e = 0; e < 8; ++e) result[e] = unpack<kDType>(x[e]);
  return result;
}

template <DType kDType>
void wgmma_of_warp(WgmmaArgs* const* lanes, bool a_in_registers, bool trans_a, bool trans_b, int32 tiles) {
  constexpr int32 kMaxColumns = 256;
  emulator::Warp& warp = emulator::here->warps[emulator::current->index.x / 32];
  const int32 first_row = emulator::current->index.x / 32 % 4 * 16;
  emulator::Product product = {warp.open_group};
  std::vector<WgmmaArgs> copies;
  for (int32 lane = 0; lane < 32; ++lane) {
    WgmmaArgs& args = *lanes[lane];
    copies.push_back(args);
    product.accumulators.push_back(args.d);
    if (warp.accumulators.contains(args.d)) continue;
    warp.accumulators[args.d].assign(args.d, args.d + 4 * tiles);
    memset(args.d, emulator::kPoison, 16 * tiles);
  }
  product.run = [=, &warp] {
    const int32 columns = 8 * tiles;
    float a[16][16], b[16][kMaxColumns], c[16][kMaxColumns] = {};
    for (int32 i = 0; i < 16; ++i)
      for (int32 k = 0; k < 16; ++k) {
        const int32 lane = i % 8 * 4 + k % 8 / 2, word = i / 8 + k / 8 * 2;
        if (a_in_registers) {
          a[i][k] = unpack<kDType>(uint16(copies[lane].a[word] >> (16 * (k % 2))));
        } else if ((trans_a ? i : k) % 8 == 0) {
          const auto x = operand_chunk<kDType>(copies[0].a_descriptor, trans_a, first_row + i, k);
          for (int32 e = 0; e < 8; ++e) (trans_a ? a[i + e][k] : a[i][k + e]) = x[e];
        }
      }
    for (int32 n = 0; n < columns; n += trans_b ? 8 : 1)
      for (int32 k = 0; k < 16; k += trans_b ? 1 : 8) {
        const auto x = operand_chunk<kDType>(copies[0].b, trans_b, n, k);
        for (int32 e = 0; e < 8; ++e) (trans_b ? b[k][n + e] : b[k + e][n]) = x[e];
      }
    for (int32 i = 0; i < 16; ++i)
      for (int32 k = 0; k < 16; ++k)
        for (int32 n = 0; n < columns; ++n) c[i][n] += a[i][k] * b[k][n];
    for (int32 lane = 0; lane < 32; ++lane) {
      std::vector<float>& d = warp.accumulators[copies[lane].d];
      for (int32 i = 0; i < 4 * tiles; ++i)
        d[i] = (copies[lane].accumulate ? d[i] : 0.0f) + c[lane / 4 + i % 4 / 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2];
    }
  };
  warp.products.push_back(std::move(product));
}
template void wgmma_of_warp<DType::kBF16>(WgmmaArgs* const*, bool, bool, bool, int32);
template void wgmma_of_warp<DType::kF16>(WgmmaArgs* const*, bool, bool, bool, int32);

void wgmma_commit() {
  struct Nothing {
  } nothing;
  emulator::meet(nothing, [](Nothing* const*) { ++emulator::here->warps[emulator::current->index.x / 32].open_group; });
}

int32 reduce_min(int32 x) {
  const emulator::Exchange<int32> lanes(x);
  for (const int32 other : lanes.all) x = min_of(x, other);
  return x;
}

int32 reduce_max(int32 x) {
  const emulator::Exchange<int32> lanes(x);
  for (const int32 other : lanes.all) x = max_of(x, other);
  return x;
}

}  // namespace flash::ptx
