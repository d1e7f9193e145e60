# SPDX-License-Identifier: MIT
# What `cmake --install` puts where: the layers as static libraries with their headers, the program
# and its man page, gdb's commands, and what find_package(roost) and pkg-config need to find them.
# There are two components: `program`, and `development` for those who link the libraries.

# In a build folder the program stands on top, where one looks for it.
if(TARGET roost)
  set_target_properties(roost PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR})
endif()

option(ROOST_INSTALL "Make the install target" ${PROJECT_IS_TOP_LEVEL})
if(NOT ROOST_INSTALL)
  return()
endif()

include(CMakePackageConfigHelpers)

get_property(layers GLOBAL PROPERTY ROOST_LAYERS)
install(TARGETS ${layers} EXPORT roost
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT development)
install(DIRECTORY include/roost DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT development
        FILES_MATCHING PATTERN "*.h")
if(TARGET roost)
  install(TARGETS roost RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT program)
endif()
file(GLOB pages CONFIGURE_DEPENDS docs/man/*.1)
install(FILES ${pages} DESTINATION ${CMAKE_INSTALL_MANDIR}/man1 COMPONENT program)
install(FILES docs/completion/roost.bash DESTINATION ${CMAKE_INSTALL_DATADIR}/bash-completion/completions
        RENAME roost COMPONENT program)
install(FILES docs/man/roost-nbd-protocol.7 DESTINATION ${CMAKE_INSTALL_MANDIR}/man7
  COMPONENT program)

# gdb's commands: for whoever debugs a program of their own, who sources them; and beside our program,
# under the prefix /usr, where gdb looks, it loads the second copy by itself.
install(FILES scripts/gdb/roost-gdb.py DESTINATION ${CMAKE_INSTALL_DATADIR}/roost/gdb
        COMPONENT development)
if(TARGET roost)
  install(FILES scripts/gdb/roost-gdb.py
          DESTINATION ${CMAKE_INSTALL_DATADIR}/gdb/auto-load${CMAKE_INSTALL_FULL_BINDIR}
          COMPONENT program)
endif()

# The pages, and the examples that they quote, so that their links to each other lead somewhere.
set(doc_dir ${CMAKE_INSTALL_DATADIR}/doc/libroost-dev)
install(FILES README.md DESTINATION ${doc_dir} COMPONENT development)
install(DIRECTORY docs DESTINATION ${doc_dir} COMPONENT development FILES_MATCHING PATTERN "*.md"
        PATTERN man EXCLUDE PATTERN completion EXCLUDE)
install(DIRECTORY examples/guide DESTINATION ${doc_dir}/examples COMPONENT development
        FILES_MATCHING PATTERN "*.cc" PATTERN "*.h")

# find_package(roost), which gives roost::base, roost::coro, roost::aio, ...
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/roost)
install(EXPORT roost NAMESPACE roost:: FILE roost-targets.cmake DESTINATION ${package_dir}
        COMPONENT development)
configure_package_config_file(cmake/roost-config.cmake.in
  ${PROJECT_BINARY_DIR}/install/roost-config.cmake INSTALL_DESTINATION ${package_dir})
# While the version is below one, each minor version may break what the one before promised.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/install/roost-config-version.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/install/roost-config.cmake
              ${PROJECT_BINARY_DIR}/install/roost-config-version.cmake
        DESTINATION ${package_dir} COMPONENT development)

# pkg-config roost. A linker reads archives from left to right, so the last layer comes first.
# The prefix is found from where the file lies, since `cmake --install` may be given another.
set(pc_libs "")
foreach(layer IN LISTS layers)
  string(PREPEND pc_libs "-l${layer} ")
endforeach()
string(STRIP "${pc_libs}" pc_libs)
file(RELATIVE_PATH pc_prefix ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
string(REGEX REPLACE "/$" "" pc_prefix "${pc_prefix}")
configure_file(cmake/roost.pc.in ${PROJECT_BINARY_DIR}/install/roost.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/install/roost.pc
        DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig COMPONENT development)

include(RoostPackages)
