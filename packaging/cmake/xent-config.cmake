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

# cargo-c installs libraries where the system has them.
foreach(_xent_directory IN ITEMS lib "lib/${CMAKE_LIBRARY_ARCHITECTURE}" lib64)
  set(_xent_lib "${_xent_prefix}/${_xent_directory}")
  if(NOT TARGET xent::xent AND EXISTS "${_xent_lib}/libxent.so.${xent_VERSION}")
    add_library(xent::xent SHARED IMPORTED)
    set_target_properties(xent::xent PROPERTIES
      IMPORTED_LOCATION "${_xent_lib}/libxent.so.${xent_VERSION}"
      IMPORTED_SONAME "libxent.so.${xent_VERSION_MAJOR}"
      INTERFACE_INCLUDE_DIRECTORIES "${_xent_prefix}/include")
  endif()
  if(NOT TARGET xent::static AND EXISTS "${_xent_lib}/libxent.a")
    add_library(xent::static STATIC IMPORTED)
    set_target_properties(xent::static PROPERTIES
      IMPORTED_LOCATION "${_xent_lib}/libxent.a"
      IMPORTED_LINK_INTERFACE_LANGUAGES C
      INTERFACE_INCLUDE_DIRECTORIES "${_xent_prefix}/include"
      INTERFACE_LINK_LIBRARIES "pthread;dl;m")
  endif()
endforeach()

if(NOT TARGET xent::xent AND NOT TARGET xent::static)
  set(xent_FOUND FALSE)
  set(xent_NOT_FOUND_MESSAGE "there is no library of version ${xent_VERSION} below ${_xent_prefix}")
endif()
unset(_xent_prefix)
unset(_xent_directory)
unset(_xent_lib)
