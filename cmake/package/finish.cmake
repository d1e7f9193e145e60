# SPDX-License-Identifier: MIT
# What Debian wants of the files of a package beyond what is installed elsewhere: the man page
# compressed, and the copyright file. gdb's commands lie under the full name of the program's folder,
# which is another here than where the build would install. Runs in CPack, once the components are staged.
file(GLOB staged ${CPACK_TEMPORARY_INSTALL_DIRECTORY}/*/usr)
foreach(usr IN LISTS staged)
  file(GLOB pages ${usr}/share/man/man*/*.[0-9])
  foreach(page IN LISTS pages)
    execute_process(COMMAND gzip -9n ${page} COMMAND_ERROR_IS_FATAL ANY)
  endforeach()
  set(auto_load ${usr}/share/gdb/auto-load)
  file(GLOB_RECURSE commands ${auto_load}/*.py)
  if(commands)
    file(COPY ${commands} DESTINATION ${usr}/share/gdb/moved)
    file(REMOVE_RECURSE ${auto_load})
    file(MAKE_DIRECTORY ${auto_load}/usr)
    file(RENAME ${usr}/share/gdb/moved ${auto_load}/usr/bin)
  endif()
  if(usr MATCHES "/program/usr$")
    set(package roost)
  else()
    set(package libroost-dev)
  endif()
  file(COPY ${CPACK_ROOST_COPYRIGHT} DESTINATION ${usr}/share/doc/${package}
       FILE_PERMISSIONS OWNER_READ OWNER_WRITE GROUP_READ WORLD_READ)
endforeach()
