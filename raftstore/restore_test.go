package raftstore

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// restoreVariable makes the test binary a process that restores one archive after
// the other: DIR and the archives, separated by colons.
const restoreVariable = "RAFTSTORE_TEST_RESTORER"

func restorer(list string) error {
	args := strings.Split(list, ":")
	s, err := Open(Config{
		Dir: args[0], Bind: "127.0.0.1:0", BootstrapExpect: 1, segment: 1 << 20, Tuning: Tuning{LeaderWait: patience},
		Logger: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
	})
	if err != nil {
		return err
	}
	for i := 0; ; i++ {
		b, err := os.ReadFile(args[1+i%(len(args)-1)])
		if err != nil {
			return err
		}
		fmt.Println("restoring")
		for {
			_, err := s.RestoreArchive(context.Background(), bytes.NewReader(b))
			if err == nil {
				break
			}
			if cluster.CodeOf(err) != cluster.CodeNoLeader {
				return err
			}
		}
		fmt.Println("restored")
	}
}

// A restore that is killed, at whatever point, has happened as a whole or not at all.
func TestKilledRestoreIsWholeOrNothing(t *testing.T) {
	const jobs = 40
	random := mustSeed(t)
	rounds := 12
	if os.Getenv("RXVISION_TEST_LONG") != "" {
		rounds = 200
	}
	var archives []string
	for _, name := range []string{"a", "b"} {
		s := mustOpen(t, t.TempDir())
		for i := range jobs {
			mustApply(t, s, register(fmt.Sprintf("%s-%d", name, i)))
		}
		b, _ := mustSave(t, s)
		mustClose(t, s)
		path := filepath.Join(t.TempDir(), name)
		mustWrite(t, path, string(b))
		archives = append(archives, path)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir, begun, done := t.TempDir(), 0, 0
	for round := range rounds {
		cmd := exec.CommandContext(t.Context(), self)
		cmd.Env = append(os.Environ(), restoreVariable+"="+strings.Join(append([]string{dir}, archives...), ":"))
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// The moment is a number of lines and some milliseconds.
		lines, left := bufio.NewScanner(out), 1+random.IntN(6)
		for ; left > 0 && lines.Scan(); left-- {
			if lines.Text() == "restored" {
				done++
			} else {
				begun++
			}
		}
		if left > 0 {
			t.Fatalf("round %d: the process ended by itself: %v\n%s", round, cmd.Wait(), stderr.String())
		}
		time.Sleep(time.Duration(random.IntN(30_000)) * time.Microsecond) // the random part of the moment
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // it was killed

		s := mustOpen(t, dir)
		found := map[string]int{}
		for k := range dump(t, s) {
			if id, ok := strings.CutPrefix(k, cluster.TableJobs+"/"+cluster.DefaultNamespace+"\x00"); ok {
				found[id[:1]]++
			}
		}
		if len(found) > 1 || done > 0 && found["a"]+found["b"] != jobs || found["a"]%jobs+found["b"]%jobs != 0 {
			t.Errorf("round %d: after %d restores there are jobs %v", round, done, found)
		}
		mustClose(t, s)
	}
	if done == 0 || begun == 0 {
		t.Errorf("%d restores begun, %d done", begun, done)
	}
	t.Logf("%d restores begun, %d done over %d kills", begun, done, rounds)
}
