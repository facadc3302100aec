#include "tiles.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace {

// Linux gives a process tiles when it asks for them, once: their state is 8 KB for each thread.
bool permitted() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA, of asm/prctl.h
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

bool there() {
    static const bool all = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
                            __builtin_cpu_supports("amx-bf16") && permitted();
    return all;
}

bool chosen = there();

}  // namespace

bool tiles_chosen() { return chosen; }

extern "C" {

// Whether products are computed by tiles: from now on, if they are `wanted` (1, or 0) and there are any; -1 only asks.
int flux_tiles(int wanted) {
    if (wanted >= 0) chosen = wanted && there();
    return chosen;
}
}
