// The kernels of GatedDelta for one instruction set: a file that includes this defines MOEVLM_ISA (a name),
// MOEVLM_LANES (floats in a vector) and MOEVLM_REGISTERS (vectors), and has the compiler target set.

#include "delta/state.h"

namespace moevlm::delta::MOEVLM_ISA {

extern const Kernels kernels;
const Kernels kernels = {kLanes, kTogether * kLanes, mix, advance};

}  // namespace moevlm::delta::MOEVLM_ISA
