package raftstore

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// Processes that write are killed at random moments; whatever they were told is
// stored must be there afterwards.
func TestKillNineKeepsWhatWasAcknowledged(t *testing.T) {
	rounds := 6
	if os.Getenv("RXVISION_TEST_LONG") != "" {
		rounds = 100
	}
	seed := uint64(time.Now().UnixNano())
	if v := os.Getenv("RXVISION_TEST_SEED"); v != "" {
		var err error
		if seed, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("seed %d (RXVISION_TEST_SEED repeats it)", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir, acked, total := "", map[string]uint64{}, 0
	for round := range rounds {
		if round%15 == 0 { // begin anew before the state gets so large that a round takes long
			dir, acked = t.TempDir(), map[string]uint64{}
		}
		cmd := exec.CommandContext(t.Context(), self)
		cmd.Env = append(os.Environ(), childVariable+"="+dir)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// The moment is a number of answers and some microseconds; sometimes none, while it starts.
		answers, kill := random.IntN(200), time.NewTimer(time.Hour)
		if random.IntN(4) == 0 {
			kill.Reset(time.Duration(random.IntN(150)) * time.Millisecond)
			answers = -1
		}
		killed := make(chan struct{})
		go func() {
			<-kill.C
			_ = cmd.Process.Kill() // Wait tells
			close(killed)
		}()
		n := 0
		for lines := bufio.NewScanner(out); lines.Scan(); {
			var id string
			var index uint64
			if _, err := fmt.Sscanf(lines.Text(), "%s %d", &id, &index); err != nil {
				if lines.Text() != "open" {
					_, _ = cmd.Process.Kill(), cmd.Wait() // then stderr is whole
					t.Fatalf("round %d: writer says %q\n%s", round, lines.Text(), stderr.String())
				}
				continue
			}
			acked[id] = index
			total++
			if n++; n == answers+1 {
				kill.Reset(time.Duration(random.IntN(2000)) * time.Microsecond)
			}
		}
		<-killed
		if err := cmd.Wait(); err == nil || err.Error() != "signal: killed" {
			t.Fatalf("round %d: writer ended by itself: %v\n%s", round, err, stderr.String())
		}
		mustHold(t, fmt.Sprintf("round %d (killed after %d answers)", round, n), dir, acked)
	}
	if total == 0 {
		t.Error("nothing was ever acknowledged")
	}
	t.Logf("%d acknowledged writes over %d kills", total, rounds)
}

// mustHold opens the folder and looks for what was acknowledged.
func mustHold(t *testing.T, what, dir string, acked map[string]uint64) {
	t.Helper()
	s := mustOpen(t, dir)
	defer mustClose(t, s)
	snap := s.State().Snapshot()
	for id, index := range acked {
		j := snap.Job(nil, cluster.JobKey{Namespace: cluster.DefaultNamespace, ID: id})
		if j == nil || j.JobModifyIndex != index {
			t.Errorf("%s: job %s, acknowledged at index %d, is %+v", what, id, index, j)
		}
	}
	if err := s.Err(); err != nil {
		t.Errorf("%s: %v", what, err)
	}
}

// A power failure tears the last write: pages of it are there, others not. bbolt
// writes its two meta pages in turn, so the one of the last acknowledged write is
// whole while the next is under way.
func TestTornLastWrite(t *testing.T) {
	dir := t.TempDir()
	s := mustOpen(t, dir, inBbolt)
	acked := map[string]uint64{}
	for i := range 10 {
		id := fmt.Sprintf("acked-%d", i)
		acked[id] = mustApply(t, s, register(id)).Index
	}
	before, marks := mustRead(t, filepath.Join(dir, boltLogFile)), mustRead(t, filepath.Join(dir, stableFile)) // as they lie on disk now
	late := mustApply(t, s, register("unacknowledged"))
	after := mustRead(t, filepath.Join(dir, boltLogFile))
	mustClose(t, s)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	page := os.Getpagesize()
	newMeta := newerMeta(after, page)

	for trial := range 15 {
		torn := append(bytes.Clone(before), make([]byte, max(0, len(after)-len(before)))...)
		for p := 2; p*page < len(after); p++ { // any of the data pages have come through
			if random.IntN(2) == 0 {
				copy(torn[p*page:(p+1)*page], after[p*page:])
			}
		}
		want := acked
		switch trial % 3 {
		case 0: // the meta page not yet
		case 1: // half of it
			copy(torn[newMeta*page:], after[newMeta*page:newMeta*page+16+random.IntN(48)])
			torn[newMeta*page+16+48]++ // and something else in the rest
		case 2: // everything
			torn = after
			want = maps.Clone(acked)
			want["unacknowledged"] = late.Index
		}
		folder := t.TempDir()
		mustWrite(t, filepath.Join(folder, stableFile), string(marks))
		mustWrite(t, filepath.Join(folder, boltLogFile), string(torn))
		mustHold(t, fmt.Sprintf("trial %d", trial), folder, want)
	}
}

func mustRead(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// newerMeta says which of the first two pages holds the higher transaction ID
// (8 bytes at 16 + 48 of the page; the fields before it are magic, version, page
// size, flags, root, free list and high water mark).
func newerMeta(file []byte, page int) int {
	txid := func(p int) uint64 { return binary.LittleEndian.Uint64(file[p*page+16+48:]) }
	if txid(1) > txid(0) {
		return 1
	}
	return 0
}

// fillDisk writes until the store says that its disk is full.
func fillDisk(t *testing.T, s *Store, acked map[string]uint64) error {
	t.Helper()
	for i := 0; ; i++ {
		c := register(fmt.Sprintf("disk-%d-%d", len(acked), i))
		c.Submission.Source = strings.Repeat("x", 200_000)
		res, err := s.Apply(t.Context(), c)
		if err != nil {
			return err
		}
		acked[c.Job.ID] = res.Index
	}
}
