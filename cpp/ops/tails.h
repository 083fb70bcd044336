// What int4 and int2 do with the tails of rows.
#pragma once

#include <cstdint>

namespace adakv {

/// What append does with a tail that is full: codes in its page, or nothing, until attend has read it.
enum class FullTails : uint8_t { kQuantise, kLeave };

}  // namespace adakv
