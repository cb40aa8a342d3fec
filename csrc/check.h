// One way to reject an argument: name, expected, got. The Python side turns the prefix into a ValueError.
#pragma once

#include <stdexcept>
#include <string>

namespace hivilt {

[[noreturn]] inline void reject(const char* name, const std::string& expected, const std::string& got) {
  throw std::runtime_error(std::string("hivilt.ValueError: ") + name + ": expected " + expected + ", got " + got);
}

}  // namespace hivilt
