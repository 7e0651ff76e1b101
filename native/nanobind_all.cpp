// nanobind's runtime, compiled once into the module: it ships as sources.
#include <nb_combined.cpp>
