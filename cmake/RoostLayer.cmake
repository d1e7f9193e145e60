# SPDX-License-Identifier: MIT
# How every library layer, program and test of Roost is compiled.

add_library(roost_options INTERFACE)
target_compile_options(roost_options INTERFACE
  -Wall -Wextra -Wshadow -Wnon-virtual-dtor -Wimplicit-fallthrough
  $<$<BOOL:${ROOST_WERROR}>:-Werror>)
if(ROOST_SANITIZE)
  target_compile_options(roost_options INTERFACE
    -fsanitize=${ROOST_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all)
  target_link_options(roost_options INTERFACE -fsanitize=${ROOST_SANITIZE})
endif()

# roost_leave_out(TEXT...)
# says that something is left out because it cannot be had here; or refuses to go on without it.
function(roost_leave_out)
  if(ROOST_REQUIRE_PROOF)
    message(SEND_ERROR ${ARGN} "\n  (ROOST_REQUIRE_PROOF is on: nothing may be left out)")
  else()
    message(STATUS ${ARGN})
  endif()
endfunction()

# roost_add_layer(NAME SOURCES file... [DEPENDS target...] [PRIVATE_DEPENDS target...])
# makes the library roost_NAME (alias roost::NAME) from a folder under src/.
function(roost_add_layer name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPENDS;PRIVATE_DEPENDS" ${ARGN})
  add_library(roost_${name} STATIC ${ARG_SOURCES})
  add_library(roost::${name} ALIAS roost_${name})
  set_target_properties(roost_${name} PROPERTIES EXPORT_NAME ${name})
  target_include_directories(roost_${name}
    PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>
           $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>
    PRIVATE ${PROJECT_SOURCE_DIR}/src)
  target_compile_features(roost_${name} PUBLIC cxx_std_23)
  target_link_libraries(roost_${name}
    PUBLIC ${ARG_DEPENDS}
    PRIVATE $<BUILD_INTERFACE:roost_options> ${ARG_PRIVATE_DEPENDS})
  set_property(GLOBAL APPEND PROPERTY ROOST_LAYERS roost_${name})
  # Builds without it show that each source has what it needs by itself.
  if(ROOST_UNITY)
    roost_unite(roost_${name})
  endif()
endfunction()

# roost_unite(TARGET): its sources are compiled a layer at a time. Their headers are then read once,
# which is most of the work.
function(roost_unite target)
  set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_MODE GROUP)
  get_target_property(sources ${target} SOURCES)
  foreach(source IN LISTS sources)
    cmake_path(ABSOLUTE_PATH source NORMALIZE OUTPUT_VARIABLE path)
    cmake_path(GET path PARENT_PATH folder)
    cmake_path(GET folder FILENAME layer)
    set_source_files_properties(${source} PROPERTIES UNITY_GROUP ${layer})
  endforeach()
  roost_quiet_unity(${target})
endfunction()

# roost_quiet_unity(TARGET): for one whose sources are compiled together.
function(roost_quiet_unity target)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # To GCC such a source is a header, which should have no anonymous namespace.
    target_compile_options(${target} PRIVATE -Wno-subobject-linkage)
  endif()
endfunction()

# roost_describe_to_debuggers(source...)
# keeps the debug information of a few sources in every build. They describe the types from which
# scripts/gdb/roost-gdb.py reads the coroutines of a process or a core file. (No code changes by it,
# and nothing more is loaded at run time. Clang would leave out types that another source describes.)
function(roost_describe_to_debuggers)
  set_property(SOURCE ${ARGN} APPEND PROPERTY COMPILE_OPTIONS
    -g $<$<CXX_COMPILER_ID:Clang>:-fstandalone-debug>)
endfunction()

# roost_add_test(NAME SOURCES file... DEPENDS target... [APART file...] [LABELS label...]
#                [TIMEOUT seconds])
# makes one GoogleTest program, and one ctest test of each TEST in it; with a sanitizer, where a
# process takes long to start, two of each program of unit tests. Where layers are compiled as one,
# so are a few sources of a test; but for those that stand APART, whose names clash with others'.
function(roost_add_test name)
  if(NOT ROOST_BUILD_TESTS)
    return()
  endif()
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;DEPENDS;APART;LABELS" ${ARGN})
  if(NOT ARG_LABELS)
    set(ARG_LABELS unit)
  endif()
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  add_executable(${name} ${ARG_SOURCES} ${ARG_APART})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/src)
  if(ROOST_UNITY)
    # Five at a time, so that two compilers have something to do.
    set_target_properties(${name} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 5)
    set_source_files_properties(${ARG_APART} PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
    roost_quiet_unity(${name})
  endif()
  target_link_libraries(${name} PRIVATE roost_options ${ARG_DEPENDS} GTest::gtest GTest::gtest_main)
  if(ROOST_SANITIZE AND "unit" IN_LIST ARG_LABELS)
    foreach(half 0 1)
      add_test(NAME ${name}.half_${half} COMMAND ${name} --gtest_brief=1)
      set_tests_properties(${name}.half_${half} PROPERTIES
        LABELS "${ARG_LABELS}" TIMEOUT 600
        ENVIRONMENT "GTEST_TOTAL_SHARDS=2;GTEST_SHARD_INDEX=${half}")
    endforeach()
  else()
    gtest_discover_tests(${name} TEST_PREFIX "${name}." DISCOVERY_TIMEOUT 60
      PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT ${ARG_TIMEOUT})
  endif()
endfunction()

# roost_add_refusals(NAME FILE MESSAGE...): tests NAME.0, NAME.1, ... compile FILE with ROOST_REFUSED
# set to the number, and expect to be refused with each MESSAGE; "" is what is to compile.
function(roost_add_refusals name file)
  if(NOT ROOST_BUILD_TESTS)
    return()
  endif()
  get_target_property(fmt_include_dirs fmt::fmt INTERFACE_INCLUDE_DIRECTORIES)
  set(variant 0)
  foreach(message IN LISTS ARGN)
    add_test(NAME ${name}.${variant}
      COMMAND ${CMAKE_CXX_COMPILER} ${CMAKE_CXX23_STANDARD_COMPILE_OPTION} -fsyntax-only
              -I${PROJECT_SOURCE_DIR}/include "-I$<JOIN:${fmt_include_dirs},;-I>"
              -DROOST_REFUSED=${variant} ${CMAKE_CURRENT_SOURCE_DIR}/${file}
      COMMAND_EXPAND_LISTS)
    set_tests_properties(${name}.${variant} PROPERTIES LABELS unit TIMEOUT 120)
    if(message)
      set_tests_properties(${name}.${variant} PROPERTIES PASS_REGULAR_EXPRESSION "${message}")
    endif()
    math(EXPR variant "${variant} + 1")
  endforeach()
endfunction()
