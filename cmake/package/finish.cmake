# SPDX-License-Identifier: MIT
# What Debian wants of the files of a package beyond what is installed elsewhere: the man page
# compressed, and the copyright file. Runs in CPack, once the components are staged.
file(GLOB staged ${CPACK_TEMPORARY_INSTALL_DIRECTORY}/*/usr)
foreach(usr IN LISTS staged)
  file(GLOB pages ${usr}/share/man/man*/*.[0-9])
  foreach(page IN LISTS pages)
    execute_process(COMMAND gzip -9n ${page} COMMAND_ERROR_IS_FATAL ANY)
  endforeach()
  if(usr MATCHES "/program/usr$")
    set(package roost)
  else()
    set(package libroost-dev)
  endif()
  file(COPY ${CPACK_ROOST_COPYRIGHT} DESTINATION ${usr}/share/doc/${package}
       FILE_PERMISSIONS OWNER_READ OWNER_WRITE GROUP_READ WORLD_READ)
endforeach()
