package main

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"strconv"
	"strings"
)

// bootstrapResetFile lies in a server's data folder, as Nomad's does. It holds the
// reset index that a refused bootstrap has told: whoever can write it may bootstrap
// access control once more, when all management tokens are lost.
const bootstrapResetFile = "acl-bootstrap-reset"

// bootstrapReset reads the index in the file at each bootstrap; 0 when there is none.
func bootstrapReset(path string, log *slog.Logger) func() uint64 {
	return func() uint64 {
		text, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return 0
		}
		var index uint64
		if err == nil {
			index, err = strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
		}
		if err != nil {
			log.Warn("the reset index of access control cannot be read", "file", path, "error", err)
		}
		return index
	}
}
