// Convolutions one after the other, through which an image goes strip by strip. A strip is some
// rows of the last one's result; they need some more rows of the one before, and so on up to the
// first. Of what lies between two of them only a window of rows is kept, which stays in the
// second-level cache: rows that the next strip needs again stay, the others make room. Threads
// share out the rows of the last result, each a range of its own.
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

// Bytes of all windows together, for strips of `rows` rows of the last step's result.
int64_t window_bytes(const std::vector<Step>& steps, int64_t rows);

// Into how many ranges of rows each of `images` images is cut, so that threads have equally many.
int64_t parts_of(int64_t images, int64_t threads);

// Runs all images through all steps, in strips of `rows` rows of the last result. The caller sets
// all pointers but those to what lies between two steps, and residuals that `other` names. On
// `threads` of torch's threads, on the calling one alone where that is 1.
void run_strips(const std::vector<Step>& steps, int64_t rows, int64_t threads);

}  // namespace mnet::cpu
