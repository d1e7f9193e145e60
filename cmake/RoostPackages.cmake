# SPDX-License-Identifier: MIT
# `cpack -G DEB` in a release build makes two Debian packages: roost, the program with its man page,
# and libroost-dev, the static libraries with what it takes to link, to use and to debug them.

set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_NAME roost)
# The first line of both descriptions: CPack knows none of a component's own.
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "event loops, coroutines, and a storage daemon on top")
set(CPACK_PACKAGE_CONTACT "The Roost authors <roost@localhost>")
set(CPACK_PACKAGE_DIRECTORY ${PROJECT_BINARY_DIR}/packages)
set(CPACK_PACKAGING_INSTALL_PREFIX /usr)
set(CPACK_COMPONENTS_ALL program development)
set(CPACK_PRE_BUILD_SCRIPTS ${PROJECT_SOURCE_DIR}/cmake/package/finish.cmake)
set(CPACK_ROOST_COPYRIGHT ${PROJECT_SOURCE_DIR}/cmake/package/copyright)

set(CPACK_DEB_COMPONENT_INSTALL ON)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_RELEASE 1)

set(CPACK_DEBIAN_PROGRAM_PACKAGE_NAME roost)
set(CPACK_DEBIAN_PROGRAM_PACKAGE_SECTION admin)
# Not stripped: gdb's commands read the few types that every build describes.
set(CPACK_DEBIAN_PROGRAM_PACKAGE_SHLIBDEPS ON)
set(CPACK_DEBIAN_PROGRAM_DESCRIPTION "The storage daemon: serves files, block devices and memory to NBD clients, from
several I/O threads, with io_uring where the kernel allows it.")

# Static libraries do not know what they need: what the headers include, and what roost.pc and
# find_package(roost) ask for. The names in them are those of one major version of fmt.
math(EXPR fmt_next "${fmt_VERSION_MAJOR} + 1")
string(CONCAT development_depends
  "libfmt-dev (>= ${fmt_VERSION_MAJOR}), libfmt-dev (<< ${fmt_next}~), "
  "liburing-dev (>= 2.3), pkgconf | pkg-config")
if(linux_aio_library)
  string(APPEND development_depends ", libaio-dev")
endif()
if(gnutls_target)
  string(APPEND development_depends ", libgnutls28-dev (>= 3.7)")
endif()
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_NAME libroost-dev)
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_SECTION libdevel)
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_DEPENDS "${development_depends}")
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_SUGGESTS gdb)
set(CPACK_DEBIAN_DEVELOPMENT_DESCRIPTION "The C++23 library: several event loops, and coroutines that wake on the one that
is their home. Headers, static libraries, a CMake package and a pkg-config file; the documentation, and
commands for gdb that show coroutines.")

include(CPack)
