// One way to reject an argument: name, expected, got. The Python side turns the prefix into a ValueError.
#pragma once

#include <stdexcept>
#include <string>

namespace hivilt {

template <class Expected, class Got>
void check_value(bool ok, const char* name, const Expected& expected, const Got& got) {
  if (!ok) {
    throw std::runtime_error(std::string("hivilt.ValueError: ") + name + ": expected " + expected + ", got " + got);
  }
}

}  // namespace hivilt
