# The version is that of the installed header. A program that asks for an earlier version with the same first number
# can use it: the shared library's name has that number.

file(STRINGS "${CMAKE_CURRENT_LIST_DIR}/../../../include/xent.h" _xent_lines
  REGEX "^#define XENT_VERSION_(MAJOR|MINOR|PATCH) [0-9]+$")
set(PACKAGE_VERSION "")
foreach(_xent_line IN LISTS _xent_lines)
  string(REGEX MATCH "[0-9]+$" _xent_number "${_xent_line}")
  string(APPEND PACKAGE_VERSION ".${_xent_number}")
endforeach()
string(SUBSTRING "${PACKAGE_VERSION}" 1 -1 PACKAGE_VERSION)
string(REGEX MATCH "^[0-9]+" _xent_number "${PACKAGE_VERSION}")

set(PACKAGE_VERSION_COMPATIBLE FALSE)
set(PACKAGE_VERSION_EXACT FALSE)
if(PACKAGE_FIND_VERSION_RANGE)
  if(PACKAGE_FIND_VERSION_MIN_MAJOR STREQUAL _xent_number
      AND PACKAGE_VERSION VERSION_GREATER_EQUAL PACKAGE_FIND_VERSION_MIN
      AND (PACKAGE_VERSION VERSION_LESS PACKAGE_FIND_VERSION_MAX
        OR (PACKAGE_FIND_VERSION_RANGE_MAX STREQUAL "INCLUDE"
          AND PACKAGE_VERSION VERSION_EQUAL PACKAGE_FIND_VERSION_MAX)))
    set(PACKAGE_VERSION_COMPATIBLE TRUE)
  endif()
elseif(PACKAGE_FIND_VERSION_MAJOR STREQUAL _xent_number
    AND PACKAGE_VERSION VERSION_GREATER_EQUAL PACKAGE_FIND_VERSION)
  set(PACKAGE_VERSION_COMPATIBLE TRUE)
  if(PACKAGE_VERSION VERSION_EQUAL PACKAGE_FIND_VERSION)
    set(PACKAGE_VERSION_EXACT TRUE)
  endif()
endif()

# A 32-bit program cannot use it. The size is unknown where the project has no compiled language.
if(CMAKE_SIZEOF_VOID_P AND NOT CMAKE_SIZEOF_VOID_P EQUAL 8)
  set(PACKAGE_VERSION "${PACKAGE_VERSION} (64-bit)")
  set(PACKAGE_VERSION_UNSUITABLE TRUE)
endif()
