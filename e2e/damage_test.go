package e2e

import (
	"cmp"
	byteorder "encoding/binary"
	"errors"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Faults of what a server has on its disk. A stopped server's file is changed; the server
// must then name it and print the way out, which is taken, or the byte was one that
// means nothing.

// wayOut is the command that an error prints.
var wayOut = regexp.MustCompile("`rxvision (server rebuild [^`]*)`")

const (
	inLog        = "flipped byte in a log"
	inSnapshot   = "flipped byte in a snapshot"
	tornWrite    = "torn last write"
	flipTries    = 4 // bytes until one counts
	ofNoAccount  = "… (flipped bytes that meant nothing)"
	logFiles     = "raft/log/*.wal"
	snapshotGlob = "raft/snapshots/*/*"
)

// flipIn changes a byte in one file of those that match, in random order, until the
// server refuses it; then the server is rebuilt as it says itself.
func (n *nemesis) flipIn(s *serverProcess, glob string, all bool) {
	t := n.r.t
	var named []string
	was := ""
	n.r.await("all servers are voters", func() bool { was = n.voter(s.i, s); return was != "" })
	for range flipTries {
		settled := map[string]int{}
		if glob == logFiles { // a change in the last batch before a crash cannot be told from a torn write
			for _, f := range n.files(s, glob) {
				settled[f] = used(n.read(f))
			}
			n.hold(5 * time.Second)
		}
		s.kill()
		files := n.files(s, glob)
		if len(files) == 0 {
			t.Errorf("%s has no file %s", s.name, glob)
			break
		}
		if !all {
			files = files[:1]
		}
		named = named[:0]
		for _, f := range files {
			b := n.read(f)
			n.flip(f, b[:cmp.Or(settled[f], used(b))])
			named = append(named, filepath.Base(f))
		}
		s.start()
		if n.ends(s) {
			n.rebuild(s, was, named)
			return
		}
		n.done[ofNoAccount]++
	}
	t.Logf("%s took %d flipped bytes in %s for none", s.name, flipTries, glob)
}

// files are those of a server that hold something, in random order.
func (n *nemesis) files(s *serverProcess, glob string) []string {
	files, err := filepath.Glob(filepath.Join(s.data, glob))
	if err != nil {
		n.r.t.Fatal(err)
	}
	files = slices.DeleteFunc(files, func(f string) bool { return used(n.read(f)) == 0 })
	n.rng.Shuffle(len(files), func(i, j int) { files[i], files[j] = files[j], files[i] })
	return files
}

// used is how much of a file that was made larger than needed holds something.
func used(b []byte) int { return len(strings.TrimRight(string(b), "\x00")) }

func (n *nemesis) read(path string) []byte {
	b, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) { // a server that runs deletes what it does not need
		n.r.t.Fatal(err)
	}
	return b
}

// flip changes one bit of a file that begins with b.
func (n *nemesis) flip(path string, b []byte) {
	at := n.rng.IntN(len(b))
	b[at] ^= 1 << n.rng.IntN(8)
	n.r.t.Logf("byte %d of %d in %s", at, len(b), path)
	n.writeAt(path, b[at:at+1], at)
}

func (n *nemesis) writeAt(path string, b []byte, at int) {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		n.r.t.Fatal(err)
	}
	if _, err := f.WriteAt(b, int64(at)); err != nil {
		n.r.t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		n.r.t.Fatal(err)
	}
}

// ends says whether a server that was started ends by itself, before it knows a leader.
func (n *nemesis) ends(s *serverProcess) bool {
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if s.failed() {
			return true
		}
		if n.r.leaderOf(s.i) != "" {
			return false
		}
	}
	n.r.t.Errorf("%s neither ends nor finds a leader within a minute", s.name)
	return false
}

// rebuild takes the way out that the server printed, and waits until the region is whole again.
func (n *nemesis) rebuild(s *serverProcess, was string, files []string) {
	t := n.r.t
	said := s.out.String()
	m := wayOut.FindStringSubmatch(said)
	if m == nil || !slices.ContainsFunc(files, func(f string) bool { return strings.Contains(said, f) }) && !strings.Contains(said, filepath.Dir(logFiles)) {
		t.Fatalf("%s, with a byte changed in %v, names no file or no way out:\n%s", s.name, files, said)
	}
	t.Logf("%s says: %s", s.name, strings.TrimSpace(said[max(0, strings.LastIndex(strings.TrimSpace(said), "\n")):]))
	n.r.run(strings.Fields(m[1])...)
	s.start()
	n.r.await(s.name+" is a voter again, and its old self is gone, as every server sees it", func() bool {
		for i := range n.r.servers {
			if id := n.voter(i, s); id == "" || id == was {
				return false
			}
		}
		return n.r.leaderOf(s.i) != ""
	})
	// What was damaged is kept until the operator deletes it; here it would fill the disk.
	kept, err := filepath.Glob(filepath.Join(s.data, "raft/damaged-*"))
	if err != nil || len(kept) == 0 {
		t.Fatalf("%s kept nothing of what was damaged: %v", s.name, err)
	}
	for _, folder := range kept {
		if err := os.RemoveAll(folder); err != nil {
			t.Fatal(err)
		}
	}
}

// voter is the ID of a server as server i sees it, "" while not exactly all servers are voters.
func (n *nemesis) voter(i int, s *serverProcess) (id string) {
	var peers struct {
		Servers []struct {
			ID, Address string
			Voter       bool
		}
	}
	if !n.r.get(i, "/v1/operator/raft/configuration?stale", &peers) || len(peers.Servers) != len(n.r.servers) {
		return ""
	}
	for _, p := range peers.Servers {
		if !p.Voter {
			return ""
		}
		if p.Address == net.JoinHostPort(n.r.net.advertised(s.i), strconv.Itoa(regionRaft)) {
			id = p.ID
		}
	}
	return id
}

// tear leaves half of a batch behind the last one in a killed server's log, as when power
// fails during a write: nothing of it was acknowledged.
func (n *nemesis) tear(s *serverProcess) {
	s.kill()
	files, err := filepath.Glob(filepath.Join(s.data, logFiles))
	if err != nil {
		n.r.t.Fatal(err)
	}
	if len(files) == 0 { // killed while a snapshot took the log's place: there is no end to tear
		n.restarted(s, "between two logs")
		return
	}
	slices.Sort(files)
	newest := files[len(files)-1] // names begin with the index
	b := n.read(newest)
	at := (used(b) + 15) &^ 7
	half := make([]byte, 8+n.rng.IntN(3000))
	for i := range half {
		half[i] = byte(n.rng.Uint32())
	}
	byteorder.LittleEndian.PutUint64(half, 1|uint64(len(half)+n.rng.IntN(3000))<<32) // the header of an entry
	if at+len(half) > len(b) {
		half = half[:max(0, len(b)-at)]
	}
	n.writeAt(newest, half, at)
	n.restarted(s, "with a torn write at its log's end")
}

// restarted starts a server that was harmed in a way that it must bear.
func (n *nemesis) restarted(s *serverProcess, harm string) {
	s.start()
	if n.ends(s) {
		n.r.t.Errorf("%s does not start %s:\n%s", s.name, harm, s.out)
	}
}

// damage are the faults of files.
func (n *nemesis) damage() map[string]func() {
	any1 := func() *serverProcess { return n.r.servers[n.rng.IntN(len(n.r.servers))] }
	return map[string]func(){
		inLog:      func() { n.flipIn(any1(), logFiles, false) },
		inSnapshot: func() { n.flipIn(any1(), snapshotGlob, true) },
		tornWrite:  func() { n.tear(any1()) },
	}
}
