// The table of this level.
#include "level.h"

namespace cloister {
namespace CLOISTER_LEVEL {

#define CLOISTER_NAME_(x) #x
#define CLOISTER_NAME(x) CLOISTER_NAME_(x)

extern const Kernels kernels;
const Kernels kernels = {
    CLOISTER_NAME(CLOISTER_LEVEL),
    replace_rejected,
    mask,
    unmask,
    encode_pad,
    combine,
    lattice_digits,
    lattice_encode,
    lattice_block,
    lattice_preimages,
};

}  // namespace CLOISTER_LEVEL
}  // namespace cloister
