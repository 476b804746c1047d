# find_package(xent 0.1) defines two targets:
#   xent::xent    the shared library
#   xent::static  the static library
# Either is absent if its file is. All paths start from the place of this file, so that the prefix can be moved.

get_filename_component(_xent_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
if(NOT EXISTS "${_xent_prefix}/include/xent.h")
  # /lib may be a link to /usr/lib.
  get_filename_component(_xent_prefix "${CMAKE_CURRENT_LIST_DIR}" REALPATH)
  get_filename_component(_xent_prefix "${_xent_prefix}/../../.." ABSOLUTE)
endif()

# Sets a variable to the first of these files that is in the prefix. cargo-c installs libraries where the system has
# them.
function(_xent_find variable)
  foreach(directory IN ITEMS lib "lib/${CMAKE_LIBRARY_ARCHITECTURE}" lib64 bin)
    foreach(name IN LISTS ARGN)
      if(EXISTS "${_xent_prefix}/${directory}/${name}")
        set(${variable} "${_xent_prefix}/${directory}/${name}" PARENT_SCOPE)
        return()
      endif()
    endforeach()
  endforeach()
  set(${variable} "" PARENT_SCOPE)
endfunction()

set(_xent_import "")
set(_xent_system pthread dl m)
if(WIN32)
  _xent_find(_xent_shared xent.dll)
  _xent_find(_xent_import libxent.dll.a xent.dll.lib)
  _xent_find(_xent_static libxent.a xent.lib)
  set(_xent_system kernel32 ntdll userenv ws2_32 dbghelp)
elseif(APPLE)
  set(_xent_soname "@rpath/libxent.${xent_VERSION_MAJOR}.dylib")
  _xent_find(_xent_shared "libxent.${xent_VERSION}.dylib")
  _xent_find(_xent_static libxent.a)
else()
  set(_xent_soname "libxent.so.${xent_VERSION_MAJOR}")
  _xent_find(_xent_shared "libxent.so.${xent_VERSION}")
  _xent_find(_xent_static libxent.a)
endif()

if(_xent_shared AND NOT TARGET xent::xent)
  add_library(xent::xent SHARED IMPORTED)
  set_target_properties(xent::xent PROPERTIES
    IMPORTED_LOCATION "${_xent_shared}"
    INTERFACE_INCLUDE_DIRECTORIES "${_xent_prefix}/include")
  if(_xent_import)
    set_target_properties(xent::xent PROPERTIES IMPORTED_IMPLIB "${_xent_import}")
  else()
    set_target_properties(xent::xent PROPERTIES IMPORTED_SONAME "${_xent_soname}")
  endif()
endif()
if(_xent_static AND NOT TARGET xent::static)
  add_library(xent::static STATIC IMPORTED)
  set_target_properties(xent::static PROPERTIES
    IMPORTED_LOCATION "${_xent_static}"
    IMPORTED_LINK_INTERFACE_LANGUAGES C
    INTERFACE_INCLUDE_DIRECTORIES "${_xent_prefix}/include"
    INTERFACE_LINK_LIBRARIES "${_xent_system}")
endif()

if(NOT TARGET xent::xent AND NOT TARGET xent::static)
  set(xent_FOUND FALSE)
  set(xent_NOT_FOUND_MESSAGE "there is no library of version ${xent_VERSION} below ${_xent_prefix}")
endif()
foreach(_xent_name IN ITEMS prefix shared import static system soname name)
  unset(_xent_${_xent_name})
endforeach()
