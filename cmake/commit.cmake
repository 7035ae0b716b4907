# generated/sarissa/commit.h with the commit that is being built; rewritten at every build, touched
# only when it changes. SARISSA_COMMIT in the environment wins (a copy without history).
add_custom_target(sarissa_commit
  COMMAND ${CMAKE_COMMAND} -DSOURCE=${PROJECT_SOURCE_DIR}
    -DOUTPUT=${PROJECT_BINARY_DIR}/generated/sarissa/commit.h
    -P ${PROJECT_SOURCE_DIR}/cmake/write_commit.cmake
  BYPRODUCTS ${PROJECT_BINARY_DIR}/generated/sarissa/commit.h
  COMMENT "")
