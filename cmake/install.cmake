# What embedders get: the headers, the library, and a package for find_package(adakv CONFIG) with the
# target adakv::adakv. In a wheel all of it lies inside the Python package, which links to it too.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)
if(SKBUILD)
  set(include_dir adakv/include)
  set(library_dir adakv/lib)
else()
  set(include_dir ${CMAKE_INSTALL_INCLUDEDIR})
  set(library_dir ${CMAKE_INSTALL_LIBDIR})
endif()
set(package_dir ${library_dir}/cmake/adakv)

set(libraries adakv_core)
if(BUILD_SHARED_LIBS)
  set(libraries adakv)
elseif(ADAKV_HAS_CUDA)
  list(APPEND libraries adakv_cuda)
endif()
install(TARGETS ${libraries} EXPORT adakvTargets
  LIBRARY DESTINATION ${library_dir}
  ARCHIVE DESTINATION ${library_dir}
  INCLUDES DESTINATION ${include_dir})
install(DIRECTORY ${PROJECT_SOURCE_DIR}/cpp/include/adakv DESTINATION ${include_dir})
install(EXPORT adakvTargets NAMESPACE adakv:: DESTINATION ${package_dir})

set(package_files ${PROJECT_BINARY_DIR}/adakvConfig.cmake ${PROJECT_BINARY_DIR}/adakvConfigVersion.cmake)
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/adakvConfig.cmake.in
  ${PROJECT_BINARY_DIR}/adakvConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/adakvConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${package_files} DESTINATION ${package_dir})
