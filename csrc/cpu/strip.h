// Convolutions one after the other, through which an image goes strip by strip: a strip of the last
// one's rows needs some more rows of the one before, and so on up to the first. Of what lies
// between two of them only a window of rows is kept, which stays in the second-level cache: rows
// that the next strip needs again stay, the others make room. Every thread takes a range of the
// last rows.
#pragma once

#include <variant>
#include <vector>

#include "kernels.h"

namespace mnet::cpu {

struct Step {
  std::variant<DwconvCall, ConvCall, InterleaveCall> call;
  int64_t other = -1;  // of a ConvCall: the step before whose result is added to this one's
};

// How output rows depend on input rows.
struct RowsOf {
  int64_t H, OH, stride, reach, top, row;  // row: bytes of an output row
  int64_t first_input(int64_t oh) const;
  int64_t input_end(int64_t oh_end) const;
};
RowsOf rows_of(const Step& step);

// Rows of every step's result, [begin, end), that rows [oh, oh_end) of the last one's need.
struct Range {
  int64_t begin, end;
};
std::vector<Range> ranges_of(const std::vector<Step>& steps, int64_t oh, int64_t oh_end);

// Bytes of the windows of strips of so many rows of the last step's result.
int64_t window_bytes(const std::vector<Step>& steps, int64_t rows);

// Into how many ranges of rows an image is cut for the threads.
int64_t parts_of(int64_t images, int64_t threads);

// All pointers are set but those between two steps, and residuals that `other` names. On `threads`
// of torch's threads, on the calling one alone where that is 1.
void run_strips(const std::vector<Step>& steps, int64_t rows, int64_t threads);

}  // namespace mnet::cpu
