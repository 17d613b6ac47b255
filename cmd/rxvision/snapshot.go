package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/raftstore"
)

// raftFolder is where a server's data folder has log and snapshots.
const raftFolder = "raft"

func newSnapshot() *cobra.Command {
	cmd := &cobra.Command{Use: "snapshot", Short: "Save, inspect and restore the state of a region"}
	cmd.AddCommand(newSnapshotSave(), newSnapshotInspect(), newSnapshotRestore())
	return cmd
}

func newSnapshotSave() *cobra.Command {
	var (
		c     clientFlags
		stale bool
	)
	cmd := &cobra.Command{
		Use:   "save [FILE]",
		Short: "Save the state into an archive",
		Long: `Saves the state of the region into an archive, the same that ` + "`nomad operator snapshot save`" + `
makes. FILE is written whole or not at all, and must not be there yet; without one it
is named after the time. The bytes of models are not in it: they lie in the blob store.`,
		Example: "  rxvision snapshot save backup.snap",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			path := "rxvision-" + time.Now().UTC().Format("20060102T150405Z") + ".snap"
			if len(args) > 0 {
				path = args[0]
			}
			if _, err := os.Lstat(path); err == nil {
				return fmt.Errorf("%s is there already; choose another name", path)
			}
			err = writeWhole(path, func(w io.Writer) error {
				_, err := client.SaveSnapshot(cmd.Context(), stale, w, newBar(cmd.ErrOrStderr(), "save "+path).set)
				return err
			})
			if err != nil {
				return fmt.Errorf("save snapshot: %w", err)
			}
			in, err := raftstore.Inspect(path)
			if err != nil {
				return err
			}
			if in.Fault != nil {
				return fmt.Errorf("%s was saved, but it cannot be restored: %w", path, in.Fault)
			}
			if c.json {
				return printJSON(cmd.OutOrStdout(), describe(in))
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "saved %s: index %d, %s, verified\n", path, in.Index, bytesText(in.Length))
			return err
		},
	}
	c.add(cmd)
	cmd.Flags().BoolVar(&stale, "stale", false, "take the state of the server that is asked, even when there is no leader")
	return cmd
}

// writeWhole makes a file that has its name only once all of it is on disk. It
// replaces none.
func writeWhole(path string, write func(io.Writer) error) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return err
	}
	err = write(f)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Link(f.Name(), path) // fails when the name is taken meanwhile
	}
	return errors.Join(err, os.Remove(f.Name()))
}

// snapshotText is what `snapshot inspect -json` prints.
type snapshotText struct {
	Path, Kind  string
	Index, Term uint64
	Created     time.Time
	CreatedBy   string
	Length      int64 // bytes of the file
	Size        int64 // bytes of the state in it
	Tables      []raftstore.TableInfo
	Sound       bool
	Fault       string `json:",omitempty"`
}

func describe(in *raftstore.Inspection) snapshotText {
	t := snapshotText{
		Path: in.Path, Kind: in.Kind, Index: in.Index, Term: in.Term, Created: in.Created, CreatedBy: in.CreatedBy,
		Length: in.Length, Size: in.Size, Tables: in.Tables, Sound: in.Fault == nil,
	}
	if in.Fault != nil {
		t.Fault = in.Fault.Error()
	}
	return t
}

func newSnapshotInspect() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "inspect FILE",
		Short: "Say what a snapshot holds and whether it is sound",
		Long: `Reads an archive (snapshot save, nomad operator snapshot save) or a server's own
snapshot file (DATA-DIR/snapshots/*/state.bin), compares every checksum and builds the
whole state, in memory only. Exit code 1 when it cannot be restored.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			in, err := raftstore.Inspect(args[0])
			if err != nil {
				return err
			}
			if asJSON {
				err = printJSON(cmd.OutOrStdout(), describe(in))
			} else if in.Fault == nil || in.Tables != nil {
				err = printInspection(cmd.OutOrStdout(), in)
			}
			if err == nil && in.Fault != nil {
				err = fmt.Errorf("%s cannot be restored: %w", args[0], in.Fault)
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printInspection(w io.Writer, in *raftstore.Inspection) error {
	verdict := "sound: every checksum matches, and the records make a whole state"
	if in.Fault != nil {
		verdict = "DAMAGED: " + in.Fault.Error()
	}
	_, err := fmt.Fprintf(w, "Kind     %s, %s\nIndex    %d\nTerm     %d\nCreated  %s\nBy       %s\nVerdict  %s\n\n",
		in.Kind, bytesText(in.Length), in.Index, in.Term, in.Created.UTC().Format(time.RFC3339), in.CreatedBy, verdict)
	if err != nil {
		return err
	}
	var rows [][]string
	records, size := 0, int64(0)
	for _, t := range in.Tables {
		if t.Records == 0 {
			continue
		}
		rows = append(rows, []string{t.Name, strconv.Itoa(t.Records), bytesText(t.Bytes)})
		records, size = records+t.Records, size+t.Bytes
	}
	return table(w, "TABLE|RECORDS|SIZE", append(rows, []string{"total", strconv.Itoa(records), bytesText(size)}))
}

func newSnapshotRestore() *cobra.Command {
	var c clientFlags
	cmd := &cobra.Command{
		Use:   "restore FILE",
		Short: "Replace the state of a region by an archive's",
		Long: `Sends an archive to the region, whose state becomes what the archive holds: all of it,
or nothing when there is any error. What was there before is gone: save it first. The
archive is verified here before it is sent, and there before anything changes.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			in, err := restoreArchive(cmd, client, args[0])
			if err != nil {
				return fmt.Errorf("restore %s: %w", args[0], err)
			}
			if c.json {
				return printJSON(cmd.OutOrStdout(), describe(in))
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "restored %s: index %d, saved %s\n", args[0], in.Index, in.Created.UTC().Format(time.RFC3339))
			return err
		},
	}
	c.add(cmd)
	return cmd
}

func restoreArchive(cmd *cobra.Command, client *api.Client, path string) (*raftstore.Inspection, error) {
	in, err := raftstore.Inspect(path)
	switch {
	case err != nil:
		return nil, err
	case in.Fault != nil:
		return nil, in.Fault
	case in.Kind != raftstore.KindArchive:
		return nil, errors.New("it is a server's own snapshot file; only an archive (rxvision snapshot save) can be restored")
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return in, client.RestoreSnapshot(cmd.Context(), f, in.Length, newBar(cmd.ErrOrStderr(), "restore "+path).set)
}

func newServerRebuild() *cobra.Command {
	var (
		dir   string
		force bool
	)
	cmd := &cobra.Command{
		Use:   "rebuild",
		Short: "Make a damaged server ready to be filled again by its peers",
		Long: `Moves the log, the snapshots and the identity of a stopped server into
DATA-DIR/damaged-TIME. At its next start it joins its region as a new server, gets
everything from the leader, and only then a vote; its old self is removed like any
dead server. It must be a new one: a server that forgot its vote and its log could
help to lose what was acknowledged.

The other servers of the region must be there (--retry-join). A server that is the only
one of its region is refused, because nothing would be left to rebuild it from.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if stat, err := os.Stat(filepath.Join(dir, raftFolder)); err == nil && stat.IsDir() {
				dir = filepath.Join(dir, raftFolder)
			}
			moved, err := raftstore.Rebuild(dir, force)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "moved what was there to %s; start the server, and delete that folder when all is well\n", moved)
			return err
		},
	}
	cmd.Flags().StringVar(&dir, "data-dir", filepath.Join(defaultDataDir, "server"), "the server's data folder, or the folder in it that an error names")
	cmd.Flags().BoolVar(&force, "force", false, "also when it may be the only copy")
	return cmd
}
