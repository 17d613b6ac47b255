// Command proto compiles the project's .proto files to Go with a compiler and plugins that are pinned Go modules, so that
// no protoc need be installed: `proto -root DIR -plugins DIR [FILE.proto…]`, the files relative to -root; without any, all
// under -root. Each result lies beside its source.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"

	"github.com/bufbuild/protocompile"
	"github.com/bufbuild/protocompile/protoutil"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/pluginpb"
)

var plugins = []string{"protoc-gen-go", "protoc-gen-go-grpc"}

func main() {
	root := flag.String("root", ".", "folder that imports are relative to")
	dir := flag.String("plugins", "", "folder of protoc-gen-go and protoc-gen-go-grpc")
	flag.Parse()
	if err := run(*root, *dir, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "proto:", err)
		os.Exit(1)
	}
}

func run(root, pluginDir string, files []string) error {
	if len(files) == 0 {
		var err error
		if files, err = find(root); err != nil {
			return err
		}
	}
	if len(files) == 0 {
		return fmt.Errorf("no .proto file under %s", root)
	}
	compiler := protocompile.Compiler{
		Resolver:       protocompile.WithStandardImports(&protocompile.SourceResolver{ImportPaths: []string{root}}),
		SourceInfoMode: protocompile.SourceInfoStandard, // comments go into the generated code
	}
	compiled, err := compiler.Compile(context.Background(), files...)
	if err != nil {
		return err
	}
	var all []*descriptorpb.FileDescriptorProto
	seen := map[string]bool{}
	for _, file := range compiled {
		all = withImports(all, seen, file)
	}
	request, err := proto.Marshal(&pluginpb.CodeGeneratorRequest{
		FileToGenerate: files,
		Parameter:      proto.String("paths=source_relative"),
		ProtoFile:      all,
	})
	if err != nil {
		return err
	}
	for _, plugin := range plugins {
		if err := generate(filepath.Join(pluginDir, plugin), request, root); err != nil {
			return fmt.Errorf("%s: %w", plugin, err)
		}
	}
	return nil
}

// find lists the .proto files under root, leaving out hidden folders, build output and the tools' own modules.
func find(root string) (files []string, err error) {
	err = fs.WalkDir(os.DirFS(root), ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != "." && (path[0] == '.' || path == "out" || path == "tools") {
			return fs.SkipDir
		}
		if !d.IsDir() && filepath.Ext(path) == ".proto" {
			files = append(files, path)
		}
		return nil
	})
	slices.Sort(files)
	return files, err
}

// withImports appends file after everything it imports, each once, as plugins expect.
func withImports(all []*descriptorpb.FileDescriptorProto, seen map[string]bool, file protoreflect.FileDescriptor) []*descriptorpb.FileDescriptorProto {
	if seen[file.Path()] {
		return all
	}
	seen[file.Path()] = true
	for i := range file.Imports().Len() {
		all = withImports(all, seen, file.Imports().Get(i).FileDescriptor)
	}
	return append(all, protoutil.ProtoFromFileDescriptor(file))
}

func generate(plugin string, request []byte, root string) error {
	cmd := exec.Command(plugin)
	cmd.Stdin, cmd.Stderr = bytes.NewReader(request), os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return err
	}
	var response pluginpb.CodeGeneratorResponse
	if err := proto.Unmarshal(out, &response); err != nil {
		return err
	}
	if response.Error != nil {
		return errors.New(response.GetError())
	}
	for _, f := range response.GetFile() {
		if err := os.WriteFile(filepath.Join(root, f.GetName()), []byte(f.GetContent()), 0o644); err != nil {
			return err
		}
		fmt.Println("proto:", f.GetName())
	}
	return nil
}
