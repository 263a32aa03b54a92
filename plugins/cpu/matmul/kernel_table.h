// The table of kernels of one instruction set. The file that includes this has included its panel_*.h before, and has
// the compiler target set.
#include "matmul/elementwise.h"
#include "matmul/float_panel.h"

namespace moevlm::matmul::MOEVLM_ISA {

extern const Kernels kernels;
const Kernels kernels{choose_panel,   float_panel, quantize, activate,    store_row,
                      accumulate_row, softmax,     sigmoid,  pairwise_sum};

}  // namespace moevlm::matmul::MOEVLM_ISA
