// From weights and terms to segments, with every check.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "merge.h"

namespace slora {
namespace {

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

std::string item(const char* list, int64_t index) { return std::string(list) + "[" + std::to_string(index) + "]"; }

// Bytes [begin, end) that a matrix may touch, and what it is for the error message: runs of `width` bytes, `stride`
// apart. A single run has stride 0.
struct Span {
  uintptr_t begin, end;
  int64_t stride, width;
  const char* list;
  int64_t index;
};

// Adds the span of a matrix unless that is empty.
void add_span(std::vector<Span>& spans, const char* list, int64_t index, const void* data, int64_t rows, int64_t cols,
              int64_t row_stride, int64_t col_stride, Dtype dtype) {
  if (rows == 0 || cols == 0) return;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const int64_t size = bytes_of(dtype), last = (rows - 1) * row_stride + (cols - 1) * col_stride;
  // The runs go along the smaller stride; that of a single row or column says nothing.
  const bool along_rows = rows == 1 ? col_stride == 1 : cols == 1 ? row_stride != 1 : col_stride <= row_stride;
  const int64_t count = along_rows ? rows : cols, apart = along_rows ? row_stride : col_stride;
  const int64_t run = 1 + (along_rows ? (cols - 1) * col_stride : (rows - 1) * row_stride);
  spans.push_back({begin, begin + static_cast<uintptr_t>((last + 1) * size), count > 1 ? apart * size : 0, run * size,
                   list, index});
}

// Two matrices whose bytes interleave are disjoint where both are windows of one stride that do not meet.
bool disjoint_windows(const Span& a, const Span& b) {
  if (a.stride != b.stride && a.stride != 0 && b.stride != 0) return false;
  const auto stride = static_cast<uintptr_t>(std::max(a.stride, b.stride));
  if (stride == 0) return false;
  const uintptr_t ahead = b.begin >= a.begin ? (b.begin - a.begin) % stride : stride - (a.begin - b.begin) % stride;
  const uintptr_t offset = ahead % stride;
  return offset >= static_cast<uintptr_t>(a.width) && offset + static_cast<uintptr_t>(b.width) <= stride;
}

[[noreturn]] void refuse_overlap(const Span& a, const Span& b) {
  refuse(item(a.list, a.index) + " and " + item(b.list, b.index) +
         " share memory; pass each weight once, with all its terms, and matrices of their own");
}

void check_overlaps(std::vector<Span> written, const std::vector<Span>& read) {
  std::sort(written.begin(), written.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  std::vector<uintptr_t> reach;  // the furthest end among the first i + 1
  for (size_t i = 0; i < written.size(); ++i) {
    for (size_t j = i + 1; j < written.size() && written[j].begin < written[i].end; ++j)
      if (!disjoint_windows(written[i], written[j])) refuse_overlap(written[i], written[j]);
    reach.push_back(i == 0 ? written[i].end : std::max(reach.back(), written[i].end));
  }
  for (const Span& span : read) {
    const auto after = std::lower_bound(written.begin(), written.end(), span.end,
                                        [](const Span& w, uintptr_t end) { return w.begin < end; });
    for (auto i = after - written.begin(); i > 0 && reach[i - 1] > span.begin; --i) {
      const Span& other = written[i - 1];
      if (other.end > span.begin && !disjoint_windows(other, span)) refuse_overlap(other, span);
    }
  }
}

void check_weight(const Weight& weight, int64_t index) {
  const std::string name = item("weights", index);
  if (weight.rows < 0 || weight.cols < 0) refuse(name + " has a negative size");
  const int64_t size = bytes_of(weight.dtype), most = std::numeric_limits<int64_t>::max() / 2 / size;
  for (int64_t stride : {weight.source_stride, weight.target_stride}) {
    if (stride < 0) refuse(name + " has a negative row stride");
    if (weight.rows > 0 && stride > most / weight.rows) refuse(name + " is larger than the address space");
  }
  if (weight.rows > 1 && weight.cols > 0 && weight.target_stride < weight.cols)
    refuse(name + " has row stride " + std::to_string(weight.target_stride) + " and " + std::to_string(weight.cols) +
           " columns, so its rows share memory; clone it first");
}

void check_term(const Term& term, const std::vector<Weight>& weights, int64_t index) {
  const std::string name = "term " + std::to_string(index);
  if (term.weight < 0 || term.weight >= static_cast<int64_t>(weights.size()))
    refuse(name + " belongs to " + item("weights", term.weight) + ", but there are " + std::to_string(weights.size()));
  if (term.rank < 0 || term.rows < 0) refuse(name + " has a negative size");
  const int64_t rows = weights[term.weight].rows;
  if (term.first_row < 0 || term.rows > rows || term.first_row > rows - term.rows)
    refuse(name + " covers " + std::to_string(term.rows) + " rows from row " + std::to_string(term.first_row) +
           " on of " + item("weights", term.weight) + ", which has " + std::to_string(rows));
  const bool wide = weights[term.weight].dtype == Dtype::f64;
  if (!std::isfinite(wide ? term.scale : static_cast<double>(static_cast<float>(term.scale))))
    refuse(item("scales", index) + " is not finite");
  if (term.rank > std::numeric_limits<int32_t>::max() / 2) refuse(name + " has a rank of more than 2^31");
  for (int64_t stride : {term.A_strides[0], term.A_strides[1], term.B_strides[0], term.B_strides[1]})
    if (stride < 0) refuse(name + " has a negative stride");
}

}  // namespace

Plan make_plan(const std::vector<Weight>& weights, const std::vector<Term>& terms) {
  std::vector<Span> written, read;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Weight& w = weights[i];
    const auto index = static_cast<int64_t>(i);
    check_weight(w, index);
    const bool in_place = w.source == w.target;
    if (in_place && w.rows > 1 && w.cols > 0 && w.source_stride != w.target_stride)
      refuse(item("weights", index) + " has two row strides");
    add_span(written, in_place ? "weights" : "results", index, w.target, w.rows, w.cols, w.target_stride, 1, w.dtype);
    if (!in_place) add_span(read, "weights", index, w.source, w.rows, w.cols, w.source_stride, 1, w.dtype);
    if (w.backup != nullptr) add_span(written, "backup", index, w.backup, w.rows, w.cols, w.cols, 1, w.dtype);
  }
  std::vector<std::vector<size_t>> of_weight(weights.size());
  for (size_t i = 0; i < terms.size(); ++i) {
    const Term& t = terms[i];
    const auto index = static_cast<int64_t>(i);
    check_term(t, weights, index);
    if (t.rank == 0 || t.rows == 0 || t.scale == 0.0) continue;
    of_weight[t.weight].push_back(i);
    const int64_t cols = weights[t.weight].cols;
    add_span(read, "lora_As", index, t.A, t.rank, cols, t.A_strides[0], t.A_strides[1], t.A_dtype);
    add_span(read, "lora_Bs", index, t.B, t.rows, t.rank, t.B_strides[0], t.B_strides[1], t.B_dtype);
  }
  check_overlaps(std::move(written), read);

  Plan plan;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Weight& w = weights[i];
    if (w.rows == 0 || w.cols == 0) continue;
    std::vector<int64_t> cuts = {0, w.rows};
    for (size_t t : of_weight[i]) {
      cuts.push_back(terms[t].first_row);
      cuts.push_back(terms[t].first_row + terms[t].rows);
    }
    std::sort(cuts.begin(), cuts.end());
    cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
    const int64_t size = bytes_of(w.dtype);
    for (size_t c = 0; c + 1 < cuts.size(); ++c) {
      const int64_t first = cuts[c];
      Segment s{};
      s.source = static_cast<const char*>(w.source) + first * w.source_stride * size;
      s.target = static_cast<char*>(w.target) + first * w.target_stride * size;
      s.rows = cuts[c + 1] - first, s.cols = w.cols;
      s.source_stride = w.source_stride, s.target_stride = w.target_stride;
      s.dtype = w.dtype;
      if (w.backup != nullptr) s.backup = static_cast<char*>(w.backup) + first * w.cols * size;
      s.first_piece = static_cast<int64_t>(plan.pieces.size());
      for (size_t t : of_weight[i]) {
        const Term& term = terms[t];
        if (first < term.first_row || first >= term.first_row + term.rows) continue;
        const char* B = static_cast<const char*>(term.B);
        B += (first - term.first_row) * term.B_strides[0] * bytes_of(term.B_dtype);
        plan.pieces.push_back({static_cast<const char*>(term.A),
                               B,
                               {term.A_strides[0], term.A_strides[1]},
                               {term.B_strides[0], term.B_strides[1]},
                               term.rank,
                               term.scale,
                               term.A_dtype,
                               term.B_dtype});
        s.rank += term.rank;
        s.slabs += (term.rank + 15) / 16;
        const bool exact = term.A_dtype == term.B_dtype && term.A_dtype != Dtype::f32 && s.parts == 0;
        s.parts = w.dtype == Dtype::f32 ? 2 : exact ? 1 : 3;
      }
      s.pieces = static_cast<int64_t>(plan.pieces.size()) - s.first_piece;
      s.slabs *= s.parts;
      if (s.pieces > 0 || s.source != s.target || s.backup != nullptr) plan.segments.push_back(s);
    }
  }
  return plan;
}

void refuse_f64(const Plan& plan) {
  bool wide = false;
  for (const Segment& s : plan.segments) wide = wide || s.dtype == Dtype::f64;
  for (const Piece& p : plan.pieces) wide = wide || p.A_dtype == Dtype::f64 || p.B_dtype == Dtype::f64;
  if (wide) refuse("float64 has no CUDA kernel; slora.merging.batched_merge_ takes it");
}

CudaTable make_cuda_table(const Plan& plan, Dtype dtype) {
  CudaTable table{};
  std::vector<Segment> segments;
  std::vector<int32_t> first_tile;
  for (const Segment& s : plan.segments) {
    if (s.dtype != dtype) continue;
    segments.push_back(s);
    first_tile.push_back(static_cast<int32_t>(table.tile_count));
    const int64_t rows = (s.rows - 1) / cuda_tile_rows(dtype) + 1, cols = (s.cols - 1) / kCudaTileCols + 1;
    if (rows > (std::numeric_limits<int32_t>::max() - table.tile_count) / cols)
      refuse("the weights have more than 2^31 tiles; merge them in several calls");
    table.tile_count += rows * cols;
    table.slabs = std::max(table.slabs, s.slabs);
  }
  const auto append = [&table](const auto& items) {
    const size_t offset = (table.bytes.size() + 15) / 16 * 16, bytes = items.size() * sizeof(items[0]);
    table.bytes.resize(offset + bytes);
    if (bytes > 0) std::memcpy(table.bytes.data() + offset, items.data(), bytes);
    return static_cast<int64_t>(offset);
  };
  table.segments = append(segments), table.first_tile = append(first_tile), table.pieces = append(plan.pieces);
  table.segment_count = static_cast<int64_t>(segments.size());
  return table;
}

}  // namespace slora
