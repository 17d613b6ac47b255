package raftstore

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/hashicorp/raft"

	"github.com/rxvision/rxvision/cluster"
)

// Rebuild makes a damaged server one that its peers fill again: log, snapshots,
// term, vote and the server's ID go into a new folder DIR/damaged-TIME, whose
// path it gives; what says which cluster the folder belongs to stays. At its next
// start the server joins as a new one, first without a vote; the old one, dead
// for good, is removed like any dead server.
//
// It must be a new one: a server that has forgotten its vote could vote twice in
// a term, and one that has forgotten its log could make up a majority with another
// that never had an entry which was acknowledged. Both lose what was promised.
//
// A folder whose region has one server is its only copy. There, and where the
// number of servers cannot be read, force must be true.
func Rebuild(dir string, force bool) (moved string, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("rebuild %s: %w", dir, err)
		}
	}()
	if stat, err := os.Stat(dir); err != nil {
		return "", err
	} else if !stat.IsDir() {
		return "", errors.New("it is no folder")
	}
	lock, err := lockFolder(dir)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	names := existing(dir, walFolder, boltLogFile, snapFolder, failureFile, clusterFile, idFile, stableFile) // last what knows the most
	if len(names) == 0 {
		return "", errors.New("it holds no server")
	}
	switch voters := votersOf(dir); {
	case force || voters > 1:
	case voters == 1:
		return "", errors.New("it belongs to a region of one server, so it is the only copy: nothing would be left to rebuild it from; " +
			"restore a saved snapshot into an empty folder instead, or use -force to begin with nothing")
	default:
		return "", errors.New("it cannot be read how many servers its region has; if there are others, use -force")
	}
	moved = filepath.Join(dir, "damaged-"+time.Now().UTC().Format("20060102T150405.000Z"))
	if err := os.Mkdir(moved, 0o700); err != nil {
		return "", err
	}
	for _, name := range names {
		if err := os.Rename(filepath.Join(dir, name), filepath.Join(moved, name)); err != nil {
			return moved, err
		}
	}
	return moved, errors.Join(syncFolder(moved), syncFolder(dir))
}

func existing(dir string, names ...string) (out []string) {
	for _, name := range names {
		if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			out = append(out, name)
		}
	}
	return out
}

// votersOf says how many servers of the region have a vote, from whatever can be
// read; 0 when nothing can.
func votersOf(dir string) int {
	if st, err := openStable(dir, true); err == nil {
		defer st.close()
		var m mark
		if b := st.get(markKey); b != nil && cluster.Unmarshal(b, &m) == nil && m.Voters > 0 {
			return int(m.Voters)
		}
	}
	list, _ := listSnapshots(dir) // damaged ones do not count
	voters := 0
	if len(list) > 0 {
		for _, s := range list[0].Configuration.Servers {
			if s.Suffrage == raft.Voter {
				voters++
			}
		}
	}
	return voters
}
