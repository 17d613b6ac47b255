package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"
)

func TestBootstrapReset(t *testing.T) {
	path := filepath.Join(t.TempDir(), bootstrapResetFile)
	read := bootstrapReset(path, slog.New(slog.DiscardHandler))
	if got := read(); got != 0 {
		t.Errorf("without a file: %d", got)
	}
	for text, want := range map[string]uint64{"17\n": 17, " 3": 3, "": 0, "x": 0, "-1": 0} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := read(); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
}
